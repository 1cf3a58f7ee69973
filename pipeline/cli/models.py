"""Commands about models: evaluate, student init, teacher align."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.app import AsJson, app, console, quiet_libraries, reporting
from schemas.storage.files import Folder, as_folder

student_app = typer.Typer(no_args_is_help=True, help="Make student models.")
app.add_typer(student_app, name="student")
teacher_app = typer.Typer(no_args_is_help=True, help="Make teacher models.")
app.add_typer(teacher_app, name="teacher")


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
    reader: Annotated[
        str | None, typer.Option(help="Demonstrations: the model that reads STUDENT's vectors.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a student on cached rows: cross-entropy, KL to the teacher, top-1 agreement.

    On episodes: accuracy and macro-F1 by task, votes over draws, P@k, free answers, agreement with
    the teacher on candidates and subsets, with baselines beside.

    On preference pairs: preference accuracy and margin, length, KL to the baseline, and with a
    judge the implicit reward of greedy responses and the share of wins over the baseline. DATA may
    hold response_logprobs of the judge, then of its reference.

    On demonstrations STUDENT is a distiller: what its reader says after its vectors, beside what it
    says after nothing, random vectors, means of embeddings, fewer shots and all demonstrations.
    """
    from pipeline.reports import icl_report, preference_report, results_report
    from schemas.errors import ConfigError
    from schemas.storage.manifest import read_manifest

    quiet_libraries()
    folders = [as_folder(place) for place in data]
    table = read_manifest(folders[0]).table
    if table != "preference_pairs" and (judge or judge_reference or baseline):
        raise ConfigError(
            f"--judge, --judge-reference and --baseline are about preference_pairs, {data[0]} is "
            f"table {table}"
        )
    if (reader is not None) != (table == "demonstrations"):
        raise ConfigError(
            f"--reader is {reader or 'not given'} and {data[0]} is table {table}: a distiller is "
            f"measured by its reader on demonstrations, name both; leave --reader out for a student"
        )
    if reader is not None:
        _evaluate_distiller(student, reader, folders, split, score, batch_size, as_json=as_json)
    elif table == "preference_pairs":
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
        results_report.print_metrics(console, student, metrics, as_json=as_json)


def _evaluate_distiller(
    student: str,
    reader: str,
    folders: Sequence[Folder],
    split: str,
    score: Literal["mean", "sum"],
    batch_size: int,
    *,
    as_json: bool,
) -> None:
    from pipeline.planning.fingerprint import folder_identity
    from pipeline.reports.vectors_report import vectors_report
    from stages.student.evaluate.vectors import evaluate_vectors, is_cross_model
    from stages.student.options import TrainOptions

    distiller, read_by = _model_folder(student), _model_folder(reader)
    found = evaluate_vectors(
        {"distiller": distiller},
        read_by,
        folders,
        split=split,
        scoring=score,
        options=TrainOptions(eval_batch_size=batch_size),
    )
    label = {"cross_model": float(is_cross_model(folder_identity(read_by), folders))}
    if as_json:
        reports = {name: report.as_dict() for name, report in found.items()}
        console.print_json(json.dumps({"student": student, "reader": reader, **label, **reports}))
        return
    measured = {name: report.summary() | label for name, report in found.items()}
    console.print(student, highlight=False, soft_wrap=True)
    for part in vectors_report(measured, ["distiller"], f"{split} rows"):
        console.print(part)


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
    quiet_libraries()
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
    quiet_libraries()
    with reporting() as reporter:
        found = align(
            config,
            model=model,
            pairs=as_folder(pairs),
            output=output,
            on_event=reporter.trained,
        )
    console.print_json(json.dumps({"teacher": str(output), **found.metrics}))


def _model_folder(place: str) -> Path:
    """Return a model's folder on this machine: of a finished step in an object store, a copy.

    Of a training step's adapter it is that merged into its base.
    """
    from stages.models.checkpoints.adapters import whole_model
    from stages.models.checkpoints.checkpoint import local_copy

    return whole_model(local_copy(as_folder(place)))
