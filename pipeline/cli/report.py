"""The command that makes a page of a run."""

from typing import Annotated

import typer

from pipeline.cli.app import app, console, quiet_libraries
from pipeline.cli.recipes import Overrides, RecipePath
from schemas.storage.files import as_folder


@app.command()
def report(
    recipe: RecipePath,
    output: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where to write; by default <root>/reports/<name>.html."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write one HTML file to look a run over in a browser: plan, tables, samples, students, costs.

    It needs no network and no other file. A recipe that is not finished has a page as well.
    """
    from pipeline.planning.plan import make_plan
    from pipeline.planning.recipe_file import load_recipe
    from pipeline.reports.page.page import default_place, write_page

    quiet_libraries()
    loaded = load_recipe(recipe, overrides)
    place = default_place(loaded) if output is None else as_folder(output)
    write_page(loaded, make_plan(loaded), place)
    console.print(str(place), soft_wrap=True, markup=False, highlight=False)
