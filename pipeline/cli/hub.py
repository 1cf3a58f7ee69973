"""Commands about the hub: publish, fetch."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import app, console, quiet_libraries
from schemas.storage.files import as_folder


@app.command()
def publish(
    name: Annotated[str, typer.Argument(help="The data set on the hub: owner/name.")],
    folders: Annotated[list[str], typer.Argument(help="Finished table folders.")],
    private: Annotated[
        bool, typer.Option("--private", help="Only for those that its owner lets in.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="The data's licence, as the hub spells it.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="What the card calls the teacher; tables know its checksums.")
    ] = None,
) -> None:
    """Publish finished tables on the hub with a card; what is there already is not sent again."""
    from pipeline.hub.publish import publish as publish_tables
    from pipeline.reports.cells import human_bytes

    quiet_libraries()
    done = publish_tables(
        name,
        [as_folder(folder) for folder in folders],
        private=private,
        licence=licence,
        teacher=teacher,
    )
    for path in done.paths:
        _say(f"its manifest says '{path}', which looks like a path of this machine")
    _say(f"{done.url}: {human_bytes(done.num_bytes)}, commit {done.commit}")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="The data set on the hub: owner/name.")],
    folder: Annotated[Path, typer.Argument(help="Where to; it must not be there yet.")],
    revision: Annotated[
        str | None, typer.Option(help="A commit, branch or tag; by default the newest.")
    ] = None,
) -> None:
    """Fetch published tables and verify them: checksums, schema, row and position counts."""
    from pipeline.cache.verify import verify_folders
    from pipeline.hub.fetch import fetch as fetch_tables

    quiet_libraries()
    if verify_folders(fetch_tables(name, folder, revision=revision), console):
        raise typer.Exit(1)


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
