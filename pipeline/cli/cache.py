"""Commands about what is cached: verify, ls, gc, diff, inspect, export, import."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import AsJson, app, console, quiet_libraries
from schemas.storage.files import as_folder


@app.command()
def verify(
    folders: Annotated[
        list[str],
        typer.Argument(help="Table or checkpoint folders, a whole root, or a recipe for its root."),
    ],
) -> None:
    """Check finished tables and checkpoints: checksums, schema, row and position counts."""
    from pipeline.cache.verify import verify_folders
    from pipeline.planning.recipe_file import load_recipe

    places = [as_folder(folder) for folder in folders]
    roots = [
        load_recipe(place).execution.root if isinstance(place, Path) and place.is_file() else place
        for place in places
    ]
    problems = verify_folders(roots, console)
    if problems:
        raise typer.Exit(1)


@app.command()
def ls(
    place: Annotated[
        str, typer.Argument(metavar="ROOT|RECIPE", help="A root, or a recipe for its root.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show what lies in a root: tables and checkpoints, sizes, states, what each is made of."""
    from pipeline.cache.listing import print_listing
    from pipeline.planning.plan import make_plan
    from pipeline.planning.recipe_file import load_recipe

    root = as_folder(place)
    if not (isinstance(root, Path) and root.is_file()):
        print_listing(console, root, [], as_json=as_json)
        return
    recipe = load_recipe(root)
    print_listing(console, recipe.execution.root, make_plan(recipe), as_json=as_json)


@app.command()
def gc(
    root: Annotated[str, typer.Argument(help="The root to clean: a folder or a place in a store.")],
    keep: Annotated[
        list[Path],
        typer.Option(metavar="RECIPE", help="A recipe whose steps are kept. Repeatable."),
    ],
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove it; without, it is only shown.")
    ] = False,
) -> None:
    """Show what no given recipe needs of a root, and with --delete remove it."""
    from pipeline.cache.garbage import collect
    from pipeline.planning.plan import make_plan
    from pipeline.planning.recipe_file import load_recipe

    recipes = [load_recipe(path) for path in keep]
    plans = [(recipe, make_plan(recipe)) for recipe in recipes]
    collect(console, as_folder(root), plans, delete=delete)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A finished table folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another of the same kind.")],
) -> None:
    """Show what differs between two tables: settings, rows and values. Exit code 1: a row does."""
    from pipeline.cache.diff import print_difference

    if print_difference(console, as_folder(a), as_folder(b)):
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
    signals: Annotated[
        str | None, typer.Option(help="A teacher_logits folder about these rows.")
    ] = None,
) -> None:
    """Read rows as a person would: text, entropy, the likeliest tokens with their probabilities."""
    from pipeline.cache.inspect_rows import inspect_rows

    inspect_rows(
        console,
        as_folder(folder),
        first=row,
        count=rows,
        positions=positions,
        top=top,
        tokenizer=tokenizer,
        signals=None if signals is None else as_folder(signals),
    )


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="Where to write; it must not be there yet.")],
    data: Annotated[
        list[str], typer.Option(help="The input's folder, then the signals' about it. Repeatable.")
    ],
    to: Annotated[str, typer.Option(help="The format: see docs/guides/exports.md.")],
    split: Annotated[
        str | None, typer.Option(help="Which rows: train or heldout. By default all.")
    ] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="Likeliest tokens of a position, by falling odds.")
    ] = None,
) -> None:
    """Write finished tables as another trainer reads them; says what that format cannot hold."""
    from pipeline.exports.export import export_tables

    quiet_libraries()
    written, num_missing = export_tables(
        [as_folder(place) for place in data], to, as_folder(folder), split=split, k=k
    )
    rows = ", ".join(f"{name} {count:,}" for name, count in written.rows.items())
    console.print(f"{folder}: {to}, rows: {rows}", soft_wrap=True, markup=False, highlight=False)
    if num_missing:
        console.print(f"left out, without a signal: {num_missing:,} rows", highlight=False)
    console.print(f"lost: {written.lost}", soft_wrap=True, markup=False, highlight=False)


@app.command(name="import")
def import_(
    folder: Annotated[str, typer.Argument(help="The peer's rows: Parquet, or a saved data set.")],
    root: Annotated[str, typer.Argument(help="Where tables lie, such as a recipe's root.")],
    peer: Annotated[str, typer.Option("--from", help="axolotl or distillkit.")],
    tokenizer: Annotated[str, typer.Option(help="The model folder whose token ids these are.")],
    teacher: Annotated[
        str | None, typer.Option(help="What the teacher was, in words; unknown without.")
    ] = None,
    heldout_fraction: Annotated[
        float, typer.Option(help="Of rows that are of no split: how many are held out.")
    ] = 0.1,
) -> None:
    """Read what another program captured of a teacher into an inputs table and teacher_logits."""
    from pipeline.imports.import_tables import import_tables

    made = import_tables(
        as_folder(folder),
        as_folder(root),
        peer=peer,
        tokenizer=as_folder(tokenizer),
        teacher=teacher,
        heldout_fraction=heldout_fraction,
    )
    for line in made.lines():
        console.print(line, soft_wrap=True, markup=False, highlight=False)
