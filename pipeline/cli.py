"""The ``teachercache`` command. It parses, calls, prints; heavy imports happen inside commands."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from schemas.errors import TeacherCacheError
from schemas.storage.files import as_folder

if TYPE_CHECKING:
    from pipeline.plan import PlannedStep
    from pipeline.progress import ConsoleReporter
    from pipeline.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run a large teacher once, keep what it knows in Arrow shards, train students from them.",
)
student_app = typer.Typer(no_args_is_help=True, help="Make student models.")
app.add_typer(student_app, name="student")
teacher_app = typer.Typer(no_args_is_help=True, help="Make teacher models.")
app.add_typer(teacher_app, name="teacher")
console = Console(width=None if sys.stdout.isatty() else 120)  # a log has no width of its own

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a value of the recipe: --set steps.signals.encoding.k=32. Repeatable.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run the command line: one line and a non-zero exit code for whatever a user can cause."""
    try:
        app()
    except TeacherCacheError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


@contextmanager
def _reporting() -> "Iterator[ConsoleReporter]":
    """Give a reporter; however the run ends, the terminal gets its cursor back."""
    from pipeline.progress import ConsoleReporter

    try:
        with closing(ConsoleReporter(console)) as reporter:
            yield reporter
    except KeyboardInterrupt:  # caught here, because typer ends a command without a word
        print("interrupted: finished shards are kept, run again to go on", file=sys.stderr)  # noqa: T201
        raise typer.Exit(130) from None


def _plan(path: Path, overrides: list[str]) -> "tuple[Recipe, list[PlannedStep]]":
    from pipeline.plan import make_plan
    from pipeline.recipe import load_recipe

    recipe = load_recipe(path, overrides)
    return recipe, make_plan(recipe)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show what would run, what is done and why, and the rows, bytes and disk it comes to."""
    from pipeline import report

    loaded, steps = _plan(recipe, overrides)
    report.print_plan(console, loaded, steps, as_json=as_json)


@app.command()
def run(
    recipe: RecipePath,
    step: Annotated[
        str | None, typer.Option(help="Run this step alone; what it reads must be finished.")
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="With --step: make shards A to B-1 alone, no manifest."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Do all of a recipe that is not done yet, then print what came of it.

    Safe to run again at any time: finished shards are kept, a killed run loses at most the shard in
    hand of each worker. Runs of different --shards may go on at once; --step alone then finishes.
    """
    from pipeline import report
    from pipeline.run import run_plan, run_shards, step_named

    chosen = _shard_range(shards, step)
    loaded, steps = _plan(recipe, overrides)
    if step is not None:
        steps = [step_named(steps, step)]
    _quiet_libraries()
    with _reporting() as reporter:
        if chosen is None:
            run_plan(steps, loaded.execution, reporter)
        else:
            made = run_shards(steps[0], chosen, loaded.execution, reporter)
    if chosen is None:
        report.print_results(console, steps)
    else:
        report.print_group(console, steps[0], made)


def _shard_range(text: str | None, step: str | None) -> range | None:
    from schemas.errors import ConfigError

    if text is None:
        return None
    if step is None:
        raise ConfigError("--shards goes with --step NAME: say which step's shards to make")
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise ConfigError(f"--shards is '{text}', expected two numbers such as 0:16")
    return range(int(start), int(stop))


@app.command()
def submit(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[
        str, typer.Option(help="Where the cluster takes jobs: its dashboard.")
    ] = "http://127.0.0.1:8265",
) -> None:
    """Run a recipe as a job of a Ray cluster, follow its log, end with its exit code.

    The recipe travels with the job, its variables and overrides put in; its root, models and inputs
    must lie where the cluster's machines find them. The job runs with executor ray on that cluster.
    """
    from pipeline.ray_job import submit_recipe
    from pipeline.recipe import load_recipe

    raise typer.Exit(submit_recipe(load_recipe(recipe, overrides), address, console))


@app.command()
def status(recipe: RecipePath, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show how far each step is: shards, rows, bytes per token, rejected rows by reason."""
    from pipeline import report

    loaded, steps = _plan(recipe, overrides)
    report.print_status(console, loaded, steps, as_json=as_json)


@app.command()
def verify(
    folders: Annotated[
        list[str],
        typer.Argument(help="Table or checkpoint folders, a whole root, or a recipe for its root."),
    ],
) -> None:
    """Check finished tables and checkpoints: checksums, schema, row and position counts."""
    from pipeline.recipe import load_recipe
    from pipeline.verify import verify_folders

    places = [as_folder(folder) for folder in folders]
    roots = [
        load_recipe(place).execution.root if isinstance(place, Path) and place.is_file() else place
        for place in places
    ]
    problems = verify_folders(roots, console)
    if problems:
        raise typer.Exit(1)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="A finished table folder.")],
    row: Annotated[int, typer.Option(min=0, help="Which row to show first.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 1,
    positions: Annotated[int, typer.Option(min=1, help="Positions of each row.")] = 12,
    top: Annotated[int, typer.Option(min=1, help="Tokens of each distribution.")] = 5,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Model folder whose tokenizer turns ids into text.")
    ] = None,
) -> None:
    """Read rows as a person would: text, entropy, the likeliest tokens with their probabilities."""
    from pipeline.inspect_rows import inspect_rows

    inspect_rows(
        console,
        as_folder(folder),
        first=row,
        count=rows,
        positions=positions,
        top=top,
        tokenizer=tokenizer,
    )


@app.command()
def train(
    recipe: RecipePath,
    step: Annotated[str, typer.Option(help="The training step to run.")],
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to train in: sets execution.training_processes."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run one training step of a recipe from finished shards; no teacher is loaded."""
    from pipeline import report
    from pipeline.run import run_plan, training_step

    asked = [] if nproc is None else [f"execution.training_processes={nproc}"]
    loaded, steps = _plan(recipe, [*overrides, *asked])
    _quiet_libraries()
    chosen = training_step(steps, step)
    with _reporting() as reporter:
        run_plan(chosen, loaded.execution, reporter)
    report.print_results(console, chosen)


@app.command()
def evaluate(
    student: Annotated[str, typer.Argument(help="A model folder.")],
    data: Annotated[
        list[str],
        typer.Option(help="Documents, episodes or pairs folder, then tables about it. Repeatable."),
    ],
    split: Annotated[str, typer.Option(help="Which rows: heldout or train.")] = "heldout",
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    score: Annotated[
        Literal["mean", "sum"],
        typer.Option(help="Episodes: score a candidate by mean or sum of log-probs."),
    ] = "mean",
    judge: Annotated[
        str | None, typer.Option(help="Pairs: the aligned teacher that rewards responses.")
    ] = None,
    judge_reference: Annotated[
        str | None, typer.Option(help="Pairs: the model that the judge was aligned from.")
    ] = None,
    beta: Annotated[float, typer.Option(help="Pairs: factor of the judge's log-ratio.")] = 0.1,
    baseline: Annotated[
        str | None, typer.Option(help="Pairs: the student to compare with, such as the SFT one.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Pairs: most tokens that a student may answer.")
    ] = 64,
    as_json: AsJson = False,
) -> None:
    """Measure a student on cached rows: cross-entropy, KL to the teacher, top-1 agreement.

    On episodes: accuracy and macro-F1 by task, votes over draws, P@k, free answers, agreement with
    the teacher on candidates and subsets, with baselines beside.

    On preference pairs: preference accuracy and margin, length, KL to the baseline, and with a
    judge the implicit reward of greedy responses and the share of wins over the baseline. DATA may
    hold response_logprobs of the judge, then of its reference.
    """
    from pipeline import icl_report, preference_report, report
    from schemas.errors import ConfigError
    from schemas.storage.manifest import read_manifest

    _quiet_libraries()
    folders = [as_folder(place) for place in data]
    table = read_manifest(folders[0]).table
    if table != "preference_pairs" and (judge or judge_reference or baseline):
        raise ConfigError(
            f"--judge, --judge-reference and --baseline are about preference_pairs, {data[0]} is "
            f"table {table}"
        )
    if table == "preference_pairs":
        from stages.student.evaluate_preferences.work import (
            Judge,
            PreferenceOptions,
            evaluate_preferences,
        )

        if (judge is None) != (judge_reference is None):
            raise ConfigError("--judge and --judge-reference go together: give both or neither")
        judges = None
        if judge and judge_reference:
            judges = Judge(_model_folder(judge), _model_folder(judge_reference), beta)
        named = {"student": student} | ({"baseline": baseline} if baseline else {})
        measured = evaluate_preferences(
            {name: _model_folder(place) for name, place in named.items()},
            folders,
            baseline="baseline" if baseline else None,
            judge=judges,
            split=split,
            options=PreferenceOptions(max_tokens=max_tokens, batch_size=batch_size),
        )
        preference_report.print_preference_report(
            console, student, measured.as_dict(), as_json=as_json
        )
    elif table == "episodes":
        from stages.student.evaluate.icl import evaluate_episodes

        found = evaluate_episodes(
            _model_folder(student), folders, split=split, scoring=score, batch_size=batch_size
        )
        icl_report.print_icl_report(console, student, found, as_json=as_json)
    else:
        from stages.student.evaluate.positions import evaluate as measure

        metrics = measure(_model_folder(student), folders, split=split, batch_size=batch_size)
        report.print_metrics(console, student, metrics, as_json=as_json)


@student_app.command("init")
def student_init(
    teacher: Annotated[Path, typer.Option("--from", help="The teacher's model folder.")],
    layers: Annotated[str, typer.Option(help="A number (evenly spaced) or a list such as 0,3,29.")],
    output: Annotated[Path, typer.Argument(help="Where to save the student.")],
) -> None:
    """Make a student from a teacher: its tokenizer, embeddings, head and some of its layers."""
    from schemas.errors import ConfigError
    from stages.student.init.work import init_student

    parts = layers.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"--layers is '{layers}', expected a number or a list such as 0,3,29")
    numbers = [int(part) for part in parts]
    _quiet_libraries()
    info = init_student(teacher, output, numbers[0] if len(numbers) == 1 else numbers)
    console.print_json(
        json.dumps(
            {"student": str(output), "layers": list(info.layers), "parameters": info.num_parameters}
        )
    )


@teacher_app.command("align")
def teacher_align(
    model: Annotated[Path, typer.Option("--from", help="The model folder to align.")],
    pairs: Annotated[str, typer.Option(help="A finished preference_pairs folder.")],
    output: Annotated[Path, typer.Argument(help="Where to save the aligned teacher.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 20,
    beta: Annotated[float, typer.Option(help="Strength of the pull to the reference.")] = 0.1,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs a step.")] = 4,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train an adapter of this rank, then merge it.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Order of the pairs.")] = 0,
) -> None:
    """Align a teacher with preference pairs by DPO (TRL's trainer); prints held-out numbers."""
    from schemas.errors import ConfigError
    from stages.teacher.stage import AlignConfig
    from stages.teacher.work import align

    for name, value in (("beta", beta), ("lr", lr)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"--{name} is {value:g}, expected a number above 0")
    config = AlignConfig(
        beta=beta,
        lr=lr,
        max_steps=steps,
        per_device_batch_size=batch_size,
        lora_rank=lora_rank,
        seed=seed,
    )
    _quiet_libraries()
    with _reporting() as reporter:
        found = align(
            config,
            model=model,
            pairs=as_folder(pairs),
            output=output,
            on_event=reporter.trained,
        )
    console.print_json(json.dumps({"teacher": str(output), **found.metrics}))


def _model_folder(place: str) -> Path:
    """Return a model's folder on this machine: of a finished step in an object store, a copy."""
    from stages.models.checkpoints.checkpoint import local_copy

    return local_copy(as_folder(place))


def _quiet_libraries() -> None:
    """Keep libraries' own progress bars and banners out of the log."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
