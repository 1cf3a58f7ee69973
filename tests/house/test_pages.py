"""What the pages name is there: files, functions and links."""

import ast
import re
from pathlib import Path

import pytest

from tests.house.tree import REPOSITORY

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "findings/*.md", "schemas/*.md")
    for path in REPOSITORY.glob(pattern)
)


def names_in(path: Path) -> set[str]:
    """Every function, method, class and variable that a file defines."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_control_flow_names_what_is_there() -> None:
    text = (REPOSITORY / "docs" / "control-flow.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    for file, name in named:
        assert name in names_in(REPOSITORY / file), f"{file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    for link in links:
        assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_paths_of_files_that_pages_name_are_there(page: Path) -> None:
    """CONTRIBUTING's are of what a reader adds, the change log's of their day."""
    if page.name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        return
    roots = "schemas|stages|pipeline|benchmarks|examples|airflow_dags|tests|docs|findings|locks"
    for name in re.findall(rf"(?<![\w/.])((?:{roots})/[\w/]+\.\w+)", page.read_text()):
        assert (REPOSITORY / name).exists(), f"{page} names {name}"


def test_the_readme_is_one_page() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150
