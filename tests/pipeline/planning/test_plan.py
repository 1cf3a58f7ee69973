"""Plans: where each step lies, how far it is and why, and what it will come to."""

import json
import re
import shutil
from pathlib import Path

import pytest

from pipeline.state.step_state import progress_of
from schemas.errors import StoreError
from schemas.storage.manifest import read_manifest
from tests.fixtures.tiny_recipe import (
    ROWS_PER_SHARD,
    TinyRecipe,
    edit_recipe,
    make_recipe,
    teachercache,
)

STUDENT = {"stage": "student_init", "model": "teacher", "layers": [0]}
OF_STUDENT = {
    "stage": "teacher_logits",
    "input": "documents",
    "model": "small_model",
    "encoding": {"kind": "exact"},
}
SMALL_MODEL = {"step": "small", "dtype": "float32", "engine": "transformers"}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def fresh(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    """A recipe that nothing was run of."""
    return make_recipe(tmp_path / "fresh", tiny_model, paragraphs[:30])


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """A recipe that was run; tests copy it before they change anything."""
    recipe = make_recipe(tmp_path_factory.mktemp("finished"), tiny_model, paragraphs[:30])
    recipe.run()
    return recipe


@pytest.fixture
def copied(finished: TinyRecipe, tmp_path: Path) -> TinyRecipe:
    return finished.copy(tmp_path / "copied")


def test_each_step_lies_at_its_table_and_fingerprint(fresh: TinyRecipe) -> None:
    documents, signals = fresh.plan()
    assert documents.folder == fresh.root / "documents" / documents.fingerprint[:12]
    assert signals.folder == fresh.root / "teacher_logits" / signals.fingerprint[:12]
    assert signals.inputs == (documents,)
    assert not fresh.root.exists()  # planning writes nothing


def test_what_is_pending_and_why(fresh: TinyRecipe) -> None:
    documents, signals = (progress_of(step) for step in fresh.plan())
    assert (documents.state, documents.why) == ("pending", "nothing has this fingerprint")
    assert signals.state == "pending"
    assert signals.why == "nothing has this fingerprint; waits for 'documents'"
    assert signals.num_rows is None and signals.num_bytes is None


def test_a_step_without_shards_counts_none(fresh: TinyRecipe) -> None:
    edit_recipe(fresh, "steps", "small", value=STUDENT)
    for command in ("plan", "status"):
        line = next(
            line for line in teachercache(command, fresh.path).out.splitlines() if "small" in line
        )
        assert "0/?" not in line, line


def test_what_is_done_or_begun_and_why(copied: TinyRecipe) -> None:
    documents, signals = (progress_of(step) for step in copied.plan())
    assert (documents.state, signals.state) == ("done", "done")
    assert signals.why == "its manifest is complete" and not signals.estimated
    assert signals.num_shards is not None and signals.num_shards >= 8

    step = copied.step("signals")
    (step.folder / "manifest.json").unlink()
    (step.folder / f"shard-00002-of-{signals.num_shards:05d}.json").unlink()
    partial = progress_of(step)
    assert (partial.state, partial.shards_done) == ("partial", signals.num_shards - 1)
    assert partial.why == f"{signals.num_shards - 1} shards are finished" and partial.estimated
    assert partial.num_rows == signals.num_rows


@pytest.mark.parametrize(
    "encoding", ["{kind: threshold, k: 16}", "{kind: top_k, k: 20}", "{kind: exact}"]
)
def test_what_is_expected_is_near_what_comes_out(copied: TinyRecipe, encoding: str) -> None:
    """Rows and positions to the last one; bytes within a quarter, for a model of random weights."""
    override = f"steps.signals.encoding={encoding}"
    expected = progress_of(copied.step("signals", override))
    copied.run(override)
    found = progress_of(copied.step("signals", override))
    assert expected.estimated and expected.shards_done == 0
    assert (expected.num_shards, expected.num_rows) == (found.num_shards, found.num_rows)
    assert expected.num_positions == found.num_positions
    assert expected.num_bytes is not None and found.num_bytes is not None
    assert 0.8 < found.num_bytes / expected.num_bytes < 1.25, (found, expected)


@pytest.mark.slow
def test_the_head_beside_an_exact_table_is_part_of_what_it_will_take(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:12])
    edit_recipe(recipe, "steps", "signals", "encoding", value={"kind": "exact"})
    recipe.run()
    folder = recipe.step("signals").folder
    (folder / "manifest.json").unlink()
    expected = progress_of(recipe.step("signals")).num_bytes
    found = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".json")
    head = (folder / "head.safetensors").stat().st_size
    assert expected is not None and head > found / 4
    assert 0.8 < found / expected < 1.25, (found, expected)


def test_a_changed_recipe_lies_beside_what_is_there(finished: TinyRecipe) -> None:
    old = {step.name: step.folder for step in finished.plan()}
    for step in finished.plan("steps.documents.length=32"):
        assert step.folder != old[step.name]
        assert progress_of(step).state == "pending"


@pytest.mark.slow
def test_bytes_are_unknown_while_an_earlier_step_has_yet_to_make_the_model(
    copied: TinyRecipe,
) -> None:
    edit_recipe(copied, "models", "small_model", value=SMALL_MODEL)
    edit_recipe(copied, "steps", "small", value=STUDENT)
    edit_recipe(copied, "steps", "again", value=OF_STUDENT)
    progress = progress_of(copied.step("again"))
    assert progress.num_rows is not None and progress.num_bytes is None
    assert teachercache("plan", copied.path).code == 0
    copied.run()
    assert progress_of(copied.step("again")).state == "done"
    manifest = read_manifest(copied.step("again").folder)
    assert manifest.identity["models"][0]["step"] == copied.step("small").fingerprint


def test_a_folder_that_holds_another_fingerprint_is_refused(copied: TinyRecipe) -> None:
    other = copied.step("signals", "steps.signals.seed=1")
    shutil.copytree(copied.step("signals").folder, other.folder)
    with pytest.raises(StoreError, match=r"holds fingerprint .* move that folder away and run"):
        copied.run("steps.signals.seed=1")


@pytest.mark.parametrize("command", ["plan", "status"])
def test_json_is_for_machines(fresh: TinyRecipe, finished: TinyRecipe, command: str) -> None:
    before = json.loads(teachercache(command, fresh.path, "--json").out)
    assert [step["state"] for step in before] == ["pending", "pending"]
    documents, signals = json.loads(teachercache(command, finished.path, "--json").out)
    assert (documents["name"], documents["stage"]) == ("documents", "ingest")
    assert signals["state"] == "done" and signals["estimated"] is False
    assert signals["folder"] == str(finished.step("signals").folder)
    assert signals["num_rows"] == documents["num_rows"] > ROWS_PER_SHARD
    manifest = read_manifest(finished.step("signals").folder)
    assert signals["num_positions"] == sum(shard.num_positions for shard in manifest.shards)


def test_plan_and_status_say_it_in_words(
    fresh: TinyRecipe, finished: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = teachercache("plan", fresh.path).out
    assert "nothing has this fingerprint; waits for 'documents'" in said
    assert f"root {fresh.root}: " in said and "free, 2 steps of unknown size to write" in said
    said = teachercache("plan", finished.path, "--set", "steps.signals.seed=1").out
    assert "its manifest is complete" in said and "nothing has this fingerprint" in said
    assert "about " in said and "about 0 B" not in said
    assert re.search(r"about [\d.]+ kB to write$", said, re.M)
    assert "free, about 0 B to write" in teachercache("plan", finished.path).out
    said = teachercache("status", finished.path).out
    rows = read_manifest(finished.step("signals").folder).num_rows
    assert f"{rows} " in said and "done" in said and " 0 " in said
