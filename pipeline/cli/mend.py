"""Commands about MEND: vectors of tasks."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import app, console, quiet_libraries
from schemas.storage.files import as_folder

mend_app = typer.Typer(no_args_is_help=True, help="Demonstrations as vectors (MEND).")
app.add_typer(mend_app, name="mend")


@mend_app.callback()
def mend() -> None:
    """Keep ``vectors`` a command of its own although it is the only one."""


@mend_app.command()
def vectors(
    distiller: Annotated[str, typer.Argument(help="A trained distiller's folder.")],
    output: Annotated[Path, typer.Argument(help="Where to write a file for each task.")],
    data: Annotated[str, typer.Option(help="A finished demonstrations folder.")],
    task: Annotated[
        list[str] | None, typer.Option(help="Tasks, by name; none: all. Repeatable.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which rows: heldout or train.")] = "heldout",
    sample: Annotated[
        str | None, typer.Option(help="The row to read, by its sample_id, and no other.")
    ] = None,
) -> None:
    """Read the demonstrations of tasks once and keep the vectors, for their reader alone.

    Of a task's rows the one with the smallest sample_id is read; --sample chooses another.
    """
    from schemas.errors import ConfigError
    from stages.models.checkpoints.checkpoint import local_copy
    from stages.student.distiller.vectors import make_task_vectors

    if sample is not None and task:
        raise ConfigError("--sample names a row and its task: leave --task out")
    quiet_libraries()
    folder = local_copy(as_folder(distiller))
    table = as_folder(data)
    for made in make_task_vectors(folder, table, task or [], output, split=split, sample=sample):
        found = {"task": made.task, "file": str(made.file)}
        counts = {"demonstrations": made.num_demonstrations, "tokens": made.num_tokens}
        console.print_json(json.dumps(found | counts))
