"""The tree says of itself what it holds: one idea a folder and a file, no file grown too long."""

import ast
import re
import subprocess
import sys
from importlib import import_module

from schemas.table import Table
from schemas.tables import TABLES
from stages.registry import STAGES
from tests.house.tree import PACKAGES, REPOSITORY, first_line, folders
from tests.schemas.test_schemas import BOUND


def test_nothing_is_left_unfinished() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")
    for folder in (*PACKAGES, "tests", "benchmarks", "examples", "airflow_dags"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            text = path.read_text()
            assert not any(word in text for word in words), path


def test_the_readme_has_a_line_for_every_room() -> None:
    text = (REPOSITORY / "README.md").read_text()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("__init__.py"):
            folder = path.parent.relative_to(REPOSITORY).as_posix()
            if folder.count("/") > 1:
                continue
            line = ast.get_docstring(ast.parse(path.read_text()), clean=True)
            found = re.search(rf"^{folder}/ +(.*)$", text, re.M)
            is_equal = line and found and found[1] == line.splitlines()[0]
            assert is_equal, f"README has no line for {folder}/ that equals its __init__.py's"


def test_whoever_has_read_enough_of_the_tree_meets_no_traceback() -> None:
    words = [sys.executable, str(REPOSITORY / "tests/house/tree.py")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tree:
        assert tree.stdout and tree.stderr
        tree.stdout.close()
        assert tree.stderr.read() == b""
    assert tree.returncode == 0


def test_every_fault_in_the_table_has_the_test_it_names() -> None:
    text = (REPOSITORY / "docs/guides/reliability.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    heads_and_rules = 2 * sum(line.startswith("| ---") for line in lines)
    named = re.findall(r"`([\w/]+\.py)::(\w+)` \|$", text, re.M)
    assert len(named) == len(lines) - heads_and_rules > 20
    for file, name in named:
        assert f"def {name}(" in (REPOSITORY / file).read_text(), (file, name)


def test_every_file_says_in_one_sentence_what_it_is() -> None:
    for folder in folders():
        said: dict[str, str] = {}
        for path in sorted(folder.glob("*.py")):
            line = first_line(path)
            place = path.relative_to(REPOSITORY).as_posix()
            assert line and len(line) <= 110, f"{place}: {line}"
            assert line[-1] in ".?:" and ". " not in line, (
                f"{place} says more than a sentence: {line}"
            )
            assert said.setdefault(line, place) == place, f"{place} and {said[line]} say the same"


def test_no_folder_of_the_product_is_crowded_and_no_file_long() -> None:
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            num_lines = len(path.read_text().splitlines())
            assert num_lines <= 350, f"{path}: {num_lines} lines, at most 350: split it"
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"
    for folder in folders():
        if folder.relative_to(REPOSITORY).parts[0] in PACKAGES:
            modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(modules) <= 12, f"{folder}: {len(modules)} modules, at most 12: split it"


def test_a_package_says_one_line_and_holds_nothing_else() -> None:
    """But for the lists of tables, objectives and exports, the doors and the command."""
    lists = (
        "schemas",
        "schemas/tables",
        "stages/student/objectives",
        "pipeline/cli",
        "pipeline/exports",
        *("teachercache", "teachercache/own"),
    )
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("__init__.py"):
            if path.parent.relative_to(REPOSITORY).as_posix() not in lists:
                assert len(path.read_text().splitlines()) == 1, path


def test_every_table_is_in_the_list_and_has_a_golden_schema() -> None:
    """A table that is not in ``TABLES`` can be written and not read."""
    declared = set()
    for file in sorted((REPOSITORY / "schemas" / "tables").rglob("[a-z]*.py")):
        name = file.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")
        module = import_module(name)
        declared |= {value for value in vars(module).values() if isinstance(value, Table)}
    assert declared == set(TABLES.values())
    assert {bound.table for bound in BOUND.values()} == declared


def test_every_stage_is_in_the_registry() -> None:
    """A stage that is not there cannot be named in a recipe."""
    found = {
        f"stages.{'.'.join(file.relative_to(REPOSITORY / 'stages').with_suffix('').parts)}"
        for file in (REPOSITORY / "stages").rglob("stage.py")
    } - {"stages.stage"}
    assert {stage.__module__ for stage in STAGES} == found
