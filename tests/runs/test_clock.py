"""Nothing depends on the time of day: a clock that jumps redoes nothing and ends no worker."""

import ast
import json
import os
from pathlib import Path

import pytest

from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    finish,
    make_recipe,
    stamps,
    start_installed,
    table_bytes,
)
from tests.house.tree import sources

# The only places that may look at the time of day, and what for.
TIME_OF_DAY = {
    "pipeline/executors/shard_task.py": "started_at_s in a record's notes, which nobody compares",
    "pipeline/reports/page/page.py": "when a page was made, at its head",
    "pipeline/audit/audit.py": "when an audit was made, in its verdict, which nobody compares",
    "schemas/open_table.py": "when a table was opened, held against times of files of this machine",
    "schemas/storage/object_path.py": "a gs:// object's age, where a store gives no time itself",
}

JUMPING = """
import time
calls, true_time = 0, time.time
def jumping():
    global calls
    calls += 1
    return true_time() + 6 * 3600 * (-1) ** calls
time.time = jumping
"""


def test_only_a_note_reads_the_time_of_day() -> None:
    readers = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("time", "time_ns", "localtime"):
                value = node.value
                readers |= {name} if isinstance(value, ast.Name) and value.id == "time" else set()
            if isinstance(node, ast.Attribute) and node.attr in ("now", "utcnow", "today"):
                readers.add(name)
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                readers |= {name} if {a.name for a in node.names} & {"time", "time_ns"} else set()
    assert readers == set(TIME_OF_DAY)


@pytest.mark.slow
def test_a_run_whose_clock_jumps_hours_forth_and_back(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    """Every look at the clock, in the run and in its workers, is six hours off, either way.

    What an earlier run left is dated to 1970 and to 2100.
    """
    recipe = make_recipe(tmp_path / "straight", tiny_model, paragraphs[:40])
    recipe.run()
    expected = {step.name: table_bytes(step.folder) for step in recipe.plan()}
    copied = recipe.copy(tmp_path / "jumping")
    folder = copied.step("signals").folder
    (folder / "manifest.json").unlink()
    gone, *kept = sorted(folder.glob("shard-*.arrow"))[:6]
    lost = [gone, *sorted(folder.glob("shard-*.arrow"))[6:]]
    for path in lost:
        path.unlink()
    for path in (*folder.glob("shard-*"), *copied.step("documents").folder.glob("*")):
        year = 0 if len(path.name) % 2 else 4_102_444_800
        os.utime(path, (year, year))
    before = stamps(folder)
    said = _run_with_jumping_clock(copied, tmp_path)
    assert "no result within" not in said and "a worker was lost" not in said
    after = stamps(folder)
    assert all(after[path.name] == before[path.name] for path in kept)
    assert {step.name: table_bytes(step.folder) for step in copied.plan()} == expected
    record = json.loads(lost[0].with_suffix(".json").read_text())
    assert 0 <= record["notes"]["seconds"] < 600  # a duration, not a difference of times of day


def _run_with_jumping_clock(recipe: TinyRecipe, folder: Path) -> str:
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(JUMPING)
    path = os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    limits = ("--set", "execution.workers=2", "--set", "execution.shard_timeout_s=120")
    said = finish(start_installed("run", recipe.path, *limits, PYTHONPATH=path))
    assert said.code == 0, said.err
    return said.out
