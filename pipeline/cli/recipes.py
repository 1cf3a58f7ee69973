"""Commands about a recipe: plan, show, run, extend, repair, submit, status, train."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.app import AsJson, app, console, quiet_libraries, reporting

if TYPE_CHECKING:
    from pipeline.planning.plan import PlannedStep
    from pipeline.planning.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a value of the recipe: --set steps.signals.encoding.k=32. Repeatable.",
    ),
]


def _plan(path: Path, overrides: list[str]) -> "tuple[Recipe, list[PlannedStep]]":
    from pipeline.planning.plan import make_plan
    from pipeline.planning.recipe_file import load_recipe

    recipe = load_recipe(path, overrides)
    return recipe, make_plan(recipe)


NoFitCheck = Annotated[
    bool,
    typer.Option(
        "--no-fit-check", help="Start even where bytes or weights are more than there is room for."
    ),
]


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Run each step on a few rows, and say rows, bytes, time and memory of the whole.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what would run, what is done and why, and the rows, bytes and disk it comes to."""
    from pipeline.reports.plan_report import print_plan

    loaded, steps = _plan(recipe, overrides)
    if not estimate:
        print_plan(console, loaded, steps, as_json=as_json)
        return
    from pipeline.estimate.estimate import estimate_recipe
    from pipeline.estimate.report import print_estimate

    quiet_libraries()
    said = Console(stderr=True)
    found = estimate_recipe(
        loaded, steps, lambda line: said.print(line, highlight=False, markup=False, soft_wrap=True)
    )
    print_estimate(console, found, as_json=as_json)


@app.command()
def show(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """Show the recipe's models, tables and checkpoints as a tree: fingerprints, sizes, states."""
    from pipeline.reports.recipe_tree import print_tree

    print_tree(console, *_plan(recipe, overrides))


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
    no_fit_check: NoFitCheck = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Do all of a recipe that is not done yet, then print what came of it.

    Safe to run again at any time: finished shards are kept, a killed run loses at most the shard in
    hand of each worker. Runs of different --shards may go on at once; --step alone then finishes.
    """
    from pipeline.reports.plan_report import print_group
    from pipeline.reports.results_report import print_results
    from pipeline.steps.run import run_plan, run_shards, step_named

    chosen = _shard_range(shards, step)
    loaded, steps = _plan(recipe, overrides)
    if step is not None:
        steps = [step_named(steps, step)]
    quiet_libraries()
    with reporting() as reporter:
        if chosen is None:
            run_plan(steps, loaded.execution, reporter, fit_check=not no_fit_check)
        else:
            made = run_shards(
                steps[0], chosen, loaded.execution, reporter, fit_check=not no_fit_check
            )
    if chosen is None:
        print_results(console, steps)
    else:
        print_group(console, steps[0], made)


@app.command()
def extend(
    recipe: RecipePath,
    others: Annotated[
        list[str],
        typer.Option(
            "--from", metavar="FOLDER", help="Copy rows of tables of this root too. Repeatable."
        ),
    ] = [],  # noqa: B006
    step: Annotated[
        str | None, typer.Option(help="Run this step alone; what it reads must be finished.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run a recipe whose input has grown or changed: the teacher works on the new rows alone.

    Rows that a finished table of the same stage, settings and models has are copied from it, when
    their input is the same in each column. Tables of the recipe's root are looked through, and of
    each --from. A killed run is gone on with by this command or by `teachercache run`.
    """
    from pipeline.reports.results_report import print_results
    from pipeline.steps.run import run_plan, step_named
    from schemas.errors import ConfigError
    from schemas.storage.files import as_folder

    loaded, steps = _plan(recipe, overrides)
    if step is not None:
        steps = [step_named(steps, step)]
    roots = [as_folder(other) for other in others]
    for root in roots:
        if not root.is_dir():
            raise ConfigError(f"--from {root}: no such folder; expected the root of a recipe")
    quiet_libraries()
    with reporting() as reporter:
        run_plan(steps, loaded.execution, reporter, extends=[loaded.execution.root, *roots])
    print_results(console, steps)


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
def repair(
    recipe: RecipePath,
    step: Annotated[str | None, typer.Option(help="The table of this step alone.")] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Find damaged or missing shards of finished tables by checksum and make exactly those again.

    Their bytes are held to the manifest's checksums. Where an engine gives other last bits now, a
    new manifest is written, and the finished steps that were made of the old bytes are named.
    """
    from pipeline.steps.repair import repair_step
    from pipeline.steps.run import step_named

    loaded, steps = _plan(recipe, overrides)
    chosen = steps if step is None else [step_named(steps, step)]
    quiet_libraries()
    lines: list[str] = []
    with reporting() as reporter:
        for one in chosen:
            found = repair_step(steps, one, loaded.execution, reporter)
            if found is not None:
                lines.extend(found.lines(one.name))
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


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
    from pipeline.executors.ray_cluster.job import submit_recipe
    from pipeline.planning.recipe_file import load_recipe

    raise typer.Exit(submit_recipe(load_recipe(recipe, overrides), address, console))


@app.command()
def status(recipe: RecipePath, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show how far each step is: shards, rows, bytes per token, rejected rows by reason."""
    from pipeline.reports.plan_report import print_status

    loaded, steps = _plan(recipe, overrides)
    print_status(console, loaded, steps, as_json=as_json)


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
    from pipeline.reports.results_report import print_results
    from pipeline.steps.run import run_plan, training_step

    asked = [] if nproc is None else [f"execution.training_processes={nproc}"]
    loaded, steps = _plan(recipe, [*overrides, *asked])
    quiet_libraries()
    chosen = training_step(steps, step)
    with reporting() as reporter:
        run_plan(chosen, loaded.execution, reporter)
    print_results(console, chosen)
