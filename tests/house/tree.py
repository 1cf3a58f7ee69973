"""Print the tree: every folder and every file, with the first line each says of itself.

The tests of this folder read it, too.
"""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
PACKAGES = ("schemas", "stages", "pipeline", "teachercache")
FOLDERS = (*PACKAGES, "airflow_dags", "benchmarks", "examples", "tests")


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Yield the path and the code of every module of the product."""
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            yield path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text())


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the top name and relative level of every import below ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node.level


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring, "" where it has none."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def folders() -> Iterator[Path]:
    """Yield every folder with Python files in it, each before those below it."""
    for name in FOLDERS:
        found = {path.parent for path in (REPOSITORY / name).rglob("*.py")}
        yield from sorted(found | {REPOSITORY / name})


def main() -> None:
    """Print it."""
    for folder in folders():
        init = folder / "__init__.py"
        said = f"   {first_line(init)}" if init.exists() else ""
        print(f"{folder.relative_to(REPOSITORY)}/{said}")
        modules = [path for path in sorted(folder.glob("*.py")) if path != init]
        width = max((len(path.name) for path in modules), default=0)
        for path in modules:
            print(f"  {path.name:<{width}}  {first_line(path)}")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `make tree | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
