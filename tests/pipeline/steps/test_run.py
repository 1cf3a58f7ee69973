"""Runs: what is done stays untouched, what is made is the same bytes whoever makes it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pipeline.reports.progress import ConsoleReporter
from pipeline.state.step_lock import step_lock
from schemas.dataset import open_dataset
from schemas.errors import StoreError
from schemas.storage.manifest import read_manifest
from schemas.storage.records import read_notes
from tests.fixtures.machine_speed import slowness
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    edit_recipe,
    make_recipe,
    stamps,
    start,
    table_bytes,
    teachercache,
)

NUM_PARAGRAPHS = 40


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """A recipe that was run once, without interruption; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder, tiny_model, paragraphs[:NUM_PARAGRAPHS])
    events = recipe.run()
    assert events.states == {"documents": "pending", "signals": "pending"}
    assert events.finished == ["documents", "signals"]
    return recipe


@pytest.fixture
def copied(finished: TinyRecipe, tmp_path: Path) -> TinyRecipe:
    return finished.copy(tmp_path)


def shards(recipe: TinyRecipe, step: str) -> list[Path]:
    return sorted(recipe.step(step).folder.glob("shard-*.arrow"))


def all_bytes(recipe: TinyRecipe) -> dict[str, dict[str, bytes]]:
    return {step.name: table_bytes(step.folder) for step in recipe.plan()}


def test_everything_a_run_writes_verifies(finished: TinyRecipe) -> None:
    said = teachercache("verify", finished.root)
    assert said.code == 0 and said.out.count(": ok\n") == 2, said
    assert len(shards(finished, "signals")) == len(shards(finished, "documents")) >= 8
    leftovers = [path.name for path in finished.root.rglob("*") if "tmp" in path.name]
    assert not leftovers and not list(finished.root.rglob(".work"))
    rows = open_dataset([step.folder for step in finished.plan()])
    assert rows.num_missing == 0
    splits = {rows[index]["split"] for index in range(len(rows))}
    assert splits == {"train", "heldout"}


def test_a_second_run_does_nothing(copied: TinyRecipe) -> None:
    before = stamps(copied.root)
    events = copied.run()
    assert events.states == {"documents": "done", "signals": "done"}
    assert not events.made and not events.finished
    assert stamps(copied.root) == before


LOOK = """
import sys
from pipeline.cli import main
for command in ("plan", "show", "status", "run"):
    sys.argv = ["teachercache", command, sys.argv[-1]]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop
heavy = {"torch", "transformers", "vllm", "ray", "datasets", "polars", "tokenizers", "airflow"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""


def test_looking_and_finding_all_done_loads_no_heavy_library(finished: TinyRecipe) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(finished.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("done already") == 2
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_a_record_says_what_made_its_shard(finished: TinyRecipe) -> None:
    step = finished.step("signals")
    manifest = read_manifest(step.folder)
    for shard, source in zip(
        manifest.shards, read_manifest(finished.step("documents").folder).shards, strict=True
    ):
        body = read_notes(step.folder, shard.name)
        assert body is not None and body["record"]["sha256"] == shard.sha256
        notes = body["notes"]
        assert notes["fingerprint"] == step.fingerprint
        assert notes["models"][0]["engine"] == "transformers" and notes["seconds"] >= 0
        assert notes["models"][0]["dtype"] == "float32" and "torch" in notes["versions"]
        assert notes["head_check"] == "transformers"
        assert (shard.split, shard.num_rows) == (source.split, source.num_rows)
        assert shard.num_positions == source.num_tokens - source.num_rows
        assert shard.num_tokens == source.num_tokens and not shard.rejects


def test_only_what_is_missing_is_made_again_whatever_the_order(
    copied: TinyRecipe, finished: TinyRecipe
) -> None:
    """The last shards are there first, one record is torn, one shard is cut short."""
    expected = all_bytes(finished)
    folder = copied.step("signals").folder
    (folder / "manifest.json").unlink()
    zero, one, two, three, *kept = [path.with_suffix("") for path in shards(copied, "signals")]
    zero.with_suffix(".arrow").unlink()
    one.with_suffix(".json").unlink()
    two.with_suffix(".json").write_text("{")
    three.with_suffix(".arrow").write_bytes(three.with_suffix(".arrow").read_bytes()[:-8])
    (folder / f"{zero.name}.arrow.tmp-0123456789ab").write_bytes(b"half")
    before = stamps(folder)
    events = copied.run()
    assert events.states == {"documents": "done", "signals": "partial"}
    assert events.made == [path.name for path in (zero, one, two, three)]
    after = stamps(folder)
    for path in kept:
        for name in (f"{path.name}.arrow", f"{path.name}.json"):
            assert after[name] == before[name]
    assert all_bytes(copied) == expected
    assert not list(folder.glob("*tmp*"))


@pytest.mark.parametrize("step", ["documents", "signals"])
@pytest.mark.slow
def test_finished_shards_whose_bytes_have_changed_are_made_again(
    copied: TinyRecipe, finished: TinyRecipe, step: str
) -> None:
    """The size is right, so they count as finished at first; the others are kept."""
    folder = copied.step(step).folder
    (folder / "manifest.json").unlink()
    zero, one, two, *kept = [path.with_suffix("") for path in shards(copied, step)]
    zero.with_suffix(".json").unlink()
    for path in (one, two):
        content = bytearray(path.with_suffix(".arrow").read_bytes())
        content[len(content) // 2] ^= 1
        path.with_suffix(".arrow").write_bytes(content)
    before = stamps(folder)
    events = copied.run()
    assert events.made == [path.name for path in (zero, one, two)]
    (warning,) = events.warnings
    assert warning.startswith("2 finished shards no longer have the bytes") and one.name in warning
    after = stamps(folder)
    for path in kept:
        assert after[f"{path.name}.arrow"] == before[f"{path.name}.arrow"]
    assert all_bytes(copied) == all_bytes(finished)


def test_a_finished_source_that_lost_a_shard_is_told_how_to_mend(
    copied: TinyRecipe, finished: TinyRecipe
) -> None:
    first, *kept = shards(copied, "documents")
    first.unlink()
    with pytest.raises(StoreError, match=r"1 of its files are gone \(first: shard-00000-of-") as e:
        copied.run()
    assert "delete its manifest.json and run again" in str(e.value)
    (first.parent / "manifest.json").unlink()
    before = stamps(first.parent)
    assert copied.run().made == [first.stem]
    after = stamps(first.parent)
    assert all(after[path.name] == before[path.name] for path in kept)
    assert all_bytes(copied) == all_bytes(finished)


@pytest.mark.slow
def test_a_head_that_has_gone_is_written_again(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:NUM_PARAGRAPHS])
    edit_recipe(recipe, "steps", "signals", "encoding", value={"kind": "exact"})
    recipe.run()
    expected, folder = all_bytes(recipe), recipe.step("signals").folder
    assert {"head.safetensors", "head.json"} <= expected["signals"].keys()
    (folder / "head.safetensors").unlink()
    with pytest.raises(StoreError, match=r"gone \(first: head\.safetensors\)"):
        recipe.run()
    (folder / "manifest.json").unlink()
    assert recipe.run("execution.workers=2").made == []
    assert all_bytes(recipe) == expected


def test_no_damaged_head_gets_into_a_manifest(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    """What ``verify`` advises, delete the manifest and run again, mends the head too."""
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:NUM_PARAGRAPHS])
    edit_recipe(recipe, "steps", "signals", "encoding", value={"kind": "exact"})
    recipe.run()
    expected, folder = all_bytes(recipe), recipe.step("signals").folder
    head = folder / "head.safetensors"
    content = bytearray(head.read_bytes())
    content[-5] ^= 1
    head.write_bytes(content)
    assert teachercache("verify", folder).code == 1
    (folder / "manifest.json").unlink()
    assert recipe.run().made == []
    assert all_bytes(recipe) == expected
    assert teachercache("verify", folder).code == 0


def test_a_changed_recipe_writes_beside_and_never_into_what_is_there(copied: TinyRecipe) -> None:
    before = stamps(copied.root)
    events = copied.run("steps.signals.encoding.k=4")
    assert events.states == {"documents": "done", "signals": "pending"}
    after = stamps(copied.root)
    assert {name: after[name] for name in before} == before
    added = {Path(name).parts[:2] for name in after.keys() - before.keys()}
    new = copied.step("signals", "steps.signals.encoding.k=4").folder
    assert added == {("teacher_logits", new.name)}
    assert teachercache("verify", copied.root).out.count(": ok\n") == 3


def test_a_damaged_input_shard_is_refused_and_nothing_is_made_from_it(copied: TinyRecipe) -> None:
    first = shards(copied, "documents")[0]
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    with pytest.raises(StoreError, match=r"input shard .*shard-00000.* has sha256 .*verify"):
        copied.run("steps.signals.seed=1")
    folder = copied.step("signals", "steps.signals.seed=1").folder
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_work_that_a_killed_run_left_behind_is_freed(copied: TinyRecipe) -> None:
    left = copied.step("documents").folder / ".work" / "rows"
    left.mkdir(parents=True)
    (left / "range-000000.arrow").write_bytes(b"x")
    copied.run()
    assert not left.parent.exists()


def test_a_step_that_is_being_written_is_refused_in_one_line(copied: TinyRecipe) -> None:
    folder = copied.step("signals", "steps.signals.seed=1").folder
    with (
        step_lock(folder),
        pytest.raises(StoreError, match=r"is being written by process \d+ on .*; wait") as error,
    ):
        copied.run("steps.signals.seed=1")
    assert str(os.getpid()) in str(error.value) and "\n" not in str(error.value)
    copied.run("steps.signals.seed=1")


def test_a_root_that_cannot_be_written_is_one_line(copied: TinyRecipe) -> None:
    file = copied.root / "a file"
    file.write_text("")
    said = teachercache("run", copied.path, "--set", f"execution.root='{file}'")
    assert said.code == 1 and said.error.startswith(f"cannot write in {file}/documents/")


def test_what_will_not_fit_is_refused_before_an_engine_starts(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that claims a width of 10^15: its exact encoding fits no disk on earth.

    Nor its head any memory, which is refused even before there are documents.
    """
    model = shutil.copytree(tiny_model, tmp_path / "wide")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 10**15}))
    recipe = make_recipe(tmp_path / "recipe", model, paragraphs[:20])
    edit_recipe(recipe, "steps", "signals", "encoding", value={"kind": "exact"})
    edit_recipe(recipe, "steps", "documents", "tokenizer", value=str(tiny_model))
    said = teachercache("run", recipe.path)
    assert said.code == 2 and "GB of memory for weights and head" in said.error
    assert not recipe.step("documents").folder.exists()
    monkeypatch.setattr("pipeline.steps.fit.available_memory", lambda: 0)  # unknown
    said = teachercache("run", recipe.path)
    assert said.code == StoreError.exit_code
    assert re.match(r"step 'signals' needs about [\d,.]+ MB in .*, only [\d,.]+ MB are", said.error)
    assert said.error.endswith("or run with --no-fit-check")
    assert stamps(recipe.step("signals").folder) == {}
    assert "about" in teachercache("plan", recipe.path).out


# Several workers.


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_one(finished: TinyRecipe, tmp_path: Path) -> None:
    expected = all_bytes(finished)
    recipe = finished.copy(tmp_path)
    shutil.rmtree(recipe.root / "teacher_logits")
    events = recipe.run("execution.workers=2")
    assert sorted(events.made) == [path.stem for path in shards(finished, "signals")]
    assert all_bytes(recipe) == expected


@pytest.mark.slow
def test_workers_end_with_the_run_that_started_them(finished: TinyRecipe, tmp_path: Path) -> None:
    """Killed alone, as an out-of-memory killer does it; its workers would hold the device."""
    recipe = finished.copy(tmp_path)
    shutil.rmtree(recipe.root / "teacher_logits")
    process = start("run", recipe.path, "--set", "execution.workers=2")
    folder = recipe.step("signals").folder
    while process.poll() is None and not list(folder.glob("shard-*.json")):
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    gone, alive = psutil.wait_procs(children, timeout=20 * slowness())
    assert not alive and gone


def test_a_run_says_which_engine_starts_and_only_where_one_does(
    copied: TinyRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = copied.load().models["teacher"].path
    again = copied.run()
    assert again.starts == []
    made = copied.run("steps.signals.seed=1")
    assert made.starts == [f"transformers on {teacher}"]
    reporter = ConsoleReporter(Console(width=200))
    reporter.engine_starting(made.starts[0])
    reporter.trained({"event": "start", "step": 0, "max_steps": 1})
    reporter.trained({"event": "step", "step": 1, "max_steps": 1, "loss": 0.5})
    reporter.engine_starting("another")  # each at once: it is what explains the silence
    out = capsys.readouterr().out
    assert f"starting transformers on {teacher}\n" in out and "starting another\n" in out
    assert "\n1/1 steps, loss 0.500, " in out and "[]" not in out  # of no step, no empty name
