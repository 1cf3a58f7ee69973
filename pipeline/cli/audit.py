"""The command that holds finished tables to a live teacher: audit."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import AsJson, app, console, quiet_libraries
from schemas.storage.files import as_folder


@app.command()
def audit(
    place: Annotated[
        str, typer.Argument(metavar="RECIPE|TABLE", help="A recipe, or a finished table folder.")
    ],
    step: Annotated[list[str], typer.Option(help="Of a recipe: this step alone. Repeatable.")] = [],  # noqa: B006
    model: Annotated[
        list[Path], typer.Option(help="Of a folder: the model that made it. Repeatable, in order.")
    ] = [],  # noqa: B006
    adapter: Annotated[
        list[Path], typer.Option(help="Of a folder: the adapter on that model. Repeatable.")
    ] = [],  # noqa: B006
    engine: Annotated[
        str | None, typer.Option(help="vllm or transformers. By default the one that did not.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="How many rows. By default what finds 1 % of them.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which rows are drawn.")] = 0,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="PATH=VALUE", help="As of `run`. Repeatable.")
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Make a sample of rows again with a live teacher, and compare. Exit code 1: one differs."""
    from pipeline.audit.audit import AuditOptions, audit_table
    from pipeline.audit.audited import table_in, tables_of_recipe
    from pipeline.audit.report import as_json as verdicts_as_json
    from pipeline.audit.report import print_verdict
    from schemas.errors import ConfigError

    quiet_libraries()
    if engine not in (None, "vllm", "transformers"):
        raise ConfigError(f"--engine is '{engine}', expected vllm or transformers")
    folder = as_folder(place)
    if isinstance(folder, Path) and folder.is_file():
        tables = tables_of_recipe(folder, overrides, step)
    else:
        tables = [table_in(folder, model, adapter)]
    options = AuditOptions(rows, seed, engine)  # type: ignore[arg-type]
    verdicts = {}
    for table in tables:
        verdict = audit_table(table, options, lambda line: None if as_json else _say(line))
        verdicts[table.name] = verdict
        if not as_json:
            print_verdict(console, table.name, verdict)
    if as_json:
        typer.echo(verdicts_as_json(verdicts))
    if any(verdict.outcome != "faithful" for verdict in verdicts.values()):
        raise typer.Exit(1)


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
