"""One step of a recipe at a time, and a step in groups of shards: the bytes of one whole run."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.state.step_lock import shards_lock, step_lock
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    edit_recipe,
    finish,
    make_recipe,
    start,
    table_bytes,
    teachercache,
)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """A recipe with a side file (the head), run once as a whole; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder, tiny_model, paragraphs[:40])
    edit_recipe(recipe, "steps", "signals", "encoding", value={"kind": "exact"})
    recipe.run()
    return recipe


@pytest.fixture
def begun(finished: TinyRecipe, tmp_path: Path) -> TinyRecipe:
    """The same recipe, of which only the documents are there."""
    return finished.copy(tmp_path, without="teacher_logits")


def planned(recipe: TinyRecipe, *arguments: str) -> dict[str, Any]:
    said = teachercache("plan", recipe.path, "--json", *arguments)
    assert said.code == 0 and said.out.count("\n") == 1, said
    return {step["name"]: step for step in json.loads(said.out)}


def test_the_plan_for_machines_names_kinds_needs_and_groups(begun: TinyRecipe) -> None:
    steps = planned(begun, "--set", "execution.group_size=3")
    documents, signals = steps["documents"], steps["signals"]
    assert (documents["kind"], documents["needs"], documents["groups"]) == ("source", [], None)
    assert (signals["kind"], signals["needs"]) == ("table", ["documents"])
    number = signals["num_shards"]
    assert number == documents["num_shards"] >= 8
    covered = [range(*map(int, group.split(":"))) for group in signals["groups"]]
    assert [index for group in covered for index in group] == list(range(number))
    assert {len(group) for group in covered[:-1]} == {3}
    assert signals["folder"] == str(begun.step("signals").folder)
    shutil.rmtree(begun.root / "documents")
    assert planned(begun)["signals"]["groups"] is None


@pytest.mark.slow
def test_groups_in_any_order_then_the_step_give_the_bytes_of_one_run(
    begun: TinyRecipe, finished: TinyRecipe
) -> None:
    groups = planned(begun, "--set", "execution.group_size=4")["signals"]["groups"]
    folder = begun.step("signals").folder
    for group in reversed(groups):
        said = teachercache("run", begun.path, "--step", "signals", "--shards", group)
        assert said.code == 0 and "makes the rest and the manifest" in said.out, said
        assert not (folder / "manifest.json").exists()
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    said = teachercache("run", begun.path, "--step", "signals")
    assert said.code == 0 and "documents" not in said.out.splitlines()[0]
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == made
    assert table_bytes(folder) == table_bytes(finished.step("signals").folder)
    assert "head.safetensors" in table_bytes(folder)
    again = teachercache("run", begun.path, "--step", "signals", "--shards", groups[0])
    assert again.code == 0 and "done already" in again.out
    assert "the whole step is done" in again.out and "makes the rest" not in again.out


@pytest.mark.slow
def test_a_group_leaves_the_torn_files_of_a_live_sibling_alone(begun: TinyRecipe) -> None:
    step = begun.step("signals")
    last = step.folder / f"shard-00005-of-{planned(begun)['signals']['num_shards']:05d}"
    with shards_lock(step.folder, range(4, 8)):
        theirs = last.with_name(f"{last.name}.arrow.tmp-0123456789ab")
        ours = last.with_name(f"{last.name.replace('00005', '00001')}.arrow.tmp-0123456789ab")
        for path in (theirs, ours):
            path.write_bytes(b"half")
        child = finish(start("run", begun.path, "--step", "signals", "--shards", "0:2"))
        assert child.code == 0, child.err
        assert theirs.exists() and not ours.exists()
        overlapping = finish(start("run", begun.path, "--step", "signals", "--shards", "3:5"))
        assert overlapping.code == 1 and "another run of shards 3:5" in overlapping.error
        whole = finish(start("run", begun.path))
        assert whole.code == 1 and "runs of some of its shards, the last one process" in whole.error
    with step_lock(step.folder):
        group = finish(start("run", begun.path, "--step", "signals", "--shards", "0:2"))
        assert group.code == 1 and "is being written by process" in group.error


def test_what_cannot_be_run_is_one_line(begun: TinyRecipe) -> None:
    def refused(code: int, *arguments: str) -> str:
        said = teachercache("run", begun.path, *arguments)
        assert said.code == code, said
        return said.error

    assert "'signal' is no step; there are: documents, signals" in refused(2, "--step", "signal")
    assert "goes with --step" in refused(2, "--shards", "0:2")
    for wrong in ("2", "a:b", "-1:2", ":"):
        assert "expected two numbers such as 0:16" in refused(
            2, "--step", "signals", f"--shards={wrong}"
        )
    for wrong in ("0:99", "3:3", "5:2"):
        assert "has shards 0:" in refused(2, "--step", "signals", "--shards", wrong)
    assert "of stage ingest" in refused(2, "--step", "documents", "--shards", "0:2")
    shutil.rmtree(begun.root / "documents")
    for more in ((), ("--shards", "0:2")):
        line = refused(1, "--step", "signals", *more)
        assert line.startswith("step 'documents', which 'signals' reads, is not finished: run it")


def test_verify_takes_a_recipe_for_its_root(begun: TinyRecipe) -> None:
    said = teachercache("verify", begun.path)
    assert said.code == 0 and said.out.count(": ok\n") == 1
    gone = next(begun.step("documents").folder.glob("shard-*.arrow"))
    gone.unlink()
    said = teachercache("verify", begun.path)
    assert said.code == 1 and f"  {gone} is missing\n" in said.out


@pytest.mark.slow
def test_groups_at_the_same_time_and_one_killed_give_the_same_bytes(
    begun: TinyRecipe, finished: TinyRecipe
) -> None:
    groups = planned(begun, "--set", "execution.group_size=6")["signals"]["groups"]
    folder = begun.step("signals").folder
    arguments = ("run", begun.path, "--step", "signals", "--shards")
    running = [start(*arguments, group, OMP_NUM_THREADS="1") for group in groups]
    while not list(folder.glob("shard-*.json")):
        assert all(process.poll() is None for process in running)
        time.sleep(0.01)
    running[-1].kill()
    codes = [finish(process).code for process in running]
    assert codes[:-1] == [0] * (len(groups) - 1) and codes[-1] in (0, -9)
    assert finish(start(*arguments, groups[-1], OMP_NUM_THREADS="1")).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.arrow")}
    assert finish(start("run", begun.path, OMP_NUM_THREADS="1")).code == 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.arrow")}
    assert after == before
    assert table_bytes(folder) == table_bytes(finished.step("signals").folder)
