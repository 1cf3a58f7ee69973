"""``teachercache extend``: rows of finished tables are copied, the teacher works on the others."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.planning.plan import make_plan
from pipeline.steps import extension, predecessors
from pipeline.steps.run import run_plan
from schemas.open_table import open_table
from schemas.storage.manifest import read_manifest
from stages.signals.teacher_logits import work as teacher_work
from stages.stage import Rejected
from tests.fixtures.tiny_recipe import (
    Events,
    TinyRecipe,
    edit_recipe,
    make_recipe,
    teachercache,
    write_jsonl,
)

pytestmark = pytest.mark.usefixtures("own_cache")
STEP = "signals"


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder, tiny_model, paragraphs[:30])
    edit_recipe(recipe, "steps", "documents", "mode", value="truncate")
    recipe.run()
    return recipe


@pytest.fixture
def copied(finished: TinyRecipe, tmp_path: Path) -> TinyRecipe:
    return finished.copy(tmp_path / "copied")


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the rows that the teacher was given."""
    seen: list[str] = []
    states = teacher_work.document_states

    def noted(engine: Any, shard: Any) -> Any:
        seen.extend(shard["sample_id"].to_pylist())
        return states(engine, shard)

    monkeypatch.setattr(teacher_work, "document_states", noted)
    return seen


def with_texts(recipe: TinyRecipe, texts: list[str]) -> None:
    path = write_jsonl(recipe.path.parent / "b.jsonl", texts)
    edit_recipe(recipe, "steps", "documents", "source", "paths", value=[str(path)])


def extend(recipe: TinyRecipe, *others: Path) -> Events:
    events, loaded = Events(), recipe.load()
    roots = [loaded.execution.root, *others]
    run_plan(make_plan(loaded), loaded.execution, events, extends=roots)
    return events


def rows_of(recipe: TinyRecipe, step: str = STEP) -> dict[str, dict[str, Any]]:
    table = open_table(recipe.step(step).folder, split=None, verify=True)
    return {row["sample_id"]: row for row in map(table.row, range(table.num_rows))}


def assert_equal(row: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in row.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def records(recipe: TinyRecipe) -> Iterator[dict[str, Any]]:
    for path in recipe.step(STEP).folder.glob("shard-*.json"):
        yield json.loads(path.read_text())["notes"]


def test_only_new_rows_are_worked_on_and_the_others_are_copied(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str]
) -> None:
    before, old = rows_of(copied), copied.step(STEP)
    texts = [*paragraphs[30:33], *reversed(paragraphs[4:30])]  # new, fewer, in another order
    with_texts(copied, texts)
    events = extend(copied)
    after = rows_of(copied)
    assert set(worked) == after.keys() - before.keys() and len(worked) == 3
    assert before.keys() - after.keys()
    for key in after.keys() & before.keys():
        assert_equal(after[key], before[key])
    counts = {old.fingerprint: len(after) - 3}
    assert [notes["extended_from"] for notes in records(copied)] == [counts] * len(
        read_manifest(copied.step(STEP).folder).shards
    )
    assert len(events.starts) == 1
    assert not (copied.step(STEP).folder / ".extend").exists()


def test_the_table_is_that_of_a_full_run(
    copied: TinyRecipe, paragraphs: list[str], tmp_path: Path
) -> None:
    edit_recipe(copied, "steps", STEP, "encoding", value={"kind": "top_k", "k": 4})
    copied.run()
    with_texts(copied, paragraphs[:33])
    extend(copied)
    full = copied.copy(tmp_path / "full", without=copied.step(STEP).folder.name)
    full.run()
    ours, theirs = (read_manifest(one.step(STEP).folder) for one in (copied, full))
    assert ours.fingerprint == theirs.fingerprint and ours.num_rows == theirs.num_rows
    assert [(one.num_rows, one.split) for one in ours.shards] == [
        (one.num_rows, one.split) for one in theirs.shards
    ]
    found, expected = rows_of(copied), rows_of(full)
    assert list(found) == list(expected)
    for key, row in found.items():
        ours_PK, theirs_PK = row["logprobs_PK"], expected[key]["logprobs_PK"]
        np.testing.assert_allclose(ours_PK, theirs_PK, atol=2e-3)
    assert teachercache("verify", copied.step(STEP).folder).code == 0
    assert teachercache("repair", copied.path).code == 0


def test_no_engine_starts_where_all_rows_are_known(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str]
) -> None:
    with_texts(copied, paragraphs[:20])
    events = extend(copied)
    assert events.starts == [] and worked == []
    assert len(rows_of(copied)) == 20


@pytest.mark.parametrize(
    ("keys", "value"),
    [(("encoding", "k"), 9), (("seed",), 3)],
)
def test_other_settings_are_no_predecessor(
    copied: TinyRecipe,
    worked: list[str],
    paragraphs: list[str],
    keys: tuple[str, ...],
    value: Any,
) -> None:
    with_texts(copied, paragraphs[:20])
    edit_recipe(copied, "steps", STEP, *keys, value=value)
    events = extend(copied)
    assert len(worked) == 20
    assert any("no finished table has a row of it" in line for line in events.lines)


def test_rows_of_another_root_and_of_several_tables_are_copied(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str], tmp_path: Path
) -> None:
    with_texts(copied, paragraphs[30:36])
    copied.run()
    worked.clear()
    other = copied.copy(tmp_path / "other", without="*")
    with_texts(other, paragraphs[:37])
    events = extend(other, copied.root)
    assert len(worked) == 1, events.lines
    (counts, *_) = [notes["extended_from"] for notes in records(other)]
    assert sorted(counts.values()) == [6, 30]


def test_a_row_whose_input_has_other_columns_is_not_copied(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_texts(copied, paragraphs[:20])
    digests = iter(range(1 << 20))
    monkeypatch.setattr(predecessors, "_digest", lambda values: str(next(digests)).encode())
    extend(copied)
    assert len(worked) == 20


def test_a_table_whose_input_has_gone_is_told_and_not_used(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str]
) -> None:
    (copied.step("documents").folder / "manifest.json").unlink()
    with_texts(copied, paragraphs[:20])
    events = extend(copied)
    assert len(worked) == 20
    assert any("has gone" in line for line in events.warnings)


def test_a_damaged_table_is_told_and_not_used(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str]
) -> None:
    shard = min(copied.step(STEP).folder.glob("shard-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-9])
    with_texts(copied, paragraphs[:20])
    events = extend(copied)
    assert len(worked) == 20
    assert any("repair it" in line for line in events.warnings)


def carry_on_by_run(recipe: TinyRecipe) -> Events:
    return recipe.run()


@pytest.mark.parametrize("carry_on", [extend, carry_on_by_run])
@pytest.mark.parametrize("stops_at", ["_put_together", "make_missing"])
def test_a_killed_extension_is_gone_on_with(
    copied: TinyRecipe,
    worked: list[str],
    paragraphs: list[str],
    carry_on: Callable[[TinyRecipe], Events],
    stops_at: str,
) -> None:
    with_texts(copied, paragraphs[:33])
    with pytest.MonkeyPatch.context() as patch:

        def killed(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(extension, stops_at, killed)
        with pytest.raises(KeyboardInterrupt):
            extend(copied)
    done_before = len(worked)
    assert done_before == (3 if stops_at == "_put_together" else 0)
    carry_on(copied)
    assert len(worked) == 3
    assert len(rows_of(copied)) == 33


def test_one_tau_goes_with_the_rows(copied: TinyRecipe, paragraphs: list[str]) -> None:
    found = {"kind": "threshold", "mean_k": 4}
    edit_recipe(copied, "steps", STEP, "encoding", value=found)
    copied.run()
    tau = (copied.step(STEP).folder / "calibration.json").read_bytes()
    before = rows_of(copied)
    with_texts(copied, [*paragraphs[30:33], *paragraphs[:30]])
    extend(copied)
    assert (copied.step(STEP).folder / "calibration.json").read_bytes() == tau
    after = rows_of(copied)
    for key in after.keys() & before.keys():
        assert_equal(after[key], before[key])
    assert teachercache("verify", copied.step(STEP).folder).code == 0


def test_exact_rows_come_with_their_head(copied: TinyRecipe, paragraphs: list[str]) -> None:
    edit_recipe(copied, "steps", STEP, "encoding", value={"kind": "exact"})
    copied.run()
    with_texts(copied, paragraphs[:20])
    assert extend(copied).starts == []
    assert teachercache("verify", copied.step(STEP).folder).code == 0


def test_rejected_rows_are_tried_again(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = copied.step(STEP)
    victim = next(iter(rows_of(copied)))
    encode = teacher_work._encode

    def rejects(stage: Any, blocks: Any, asked: Any, hidden: Any) -> Any:
        if asked.sample_id == victim:
            return Rejected(victim, "for this test")
        return encode(stage, blocks, asked, hidden)

    edit_recipe(copied, "steps", STEP, "max_rejected_fraction", value=0.5)
    (step.folder / "manifest.json").unlink()
    for path in step.folder.glob("shard-*"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(teacher_work, "_encode", rejects)
        copied.run()
        assert victim not in rows_of(copied)
        worked.clear()
        with_texts(copied, paragraphs[:31])
        extend(copied)
        assert victim in worked and len(worked) == 2
        assert victim not in rows_of(copied)
        manifest = read_manifest(copied.step(STEP).folder)
        assert manifest.rejects == {"for this test": 1}
    worked.clear()
    with_texts(copied, paragraphs[:32])
    extend(copied)
    assert victim in worked and victim in rows_of(copied)


def test_the_command_says_what_it_copies(copied: TinyRecipe, paragraphs: list[str]) -> None:
    with_texts(copied, paragraphs[:33])
    said = teachercache("extend", copied.path)
    assert said.code == 0, said.err
    assert "3 of 33 rows are new" in " ".join(said.out.split()), said.out
    nowhere = teachercache("extend", copied.path, "--from", copied.root / "nowhere")
    assert nowhere.code and "no such folder" in nowhere.error


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_two_workers_make_the_rows_that_one_makes(
    copied: TinyRecipe, paragraphs: list[str], tmp_path: Path, executor: str
) -> None:
    with_texts(copied, paragraphs[:33])
    crew = copied.copy(tmp_path / "crew", without="-")
    with_texts(crew, paragraphs[:33])
    extend(copied)
    edit_recipe(crew, "execution", "executor", value=executor)
    edit_recipe(crew, "execution", "workers", value=2)
    extend(crew)
    one, two = rows_of(copied), rows_of(crew)
    assert list(one) == list(two)
    for key, row in one.items():
        assert_equal(row, two[key])
    notes = json.loads(min(crew.step(STEP).folder.glob("shard-*.json")).read_text())["notes"]
    assert notes["extended_from"] == {copied_from(crew): 30}


def copied_from(recipe: TinyRecipe) -> str:
    """The fingerprint of the other signal table of the root."""
    (other,) = {*recipe.step(STEP).folder.parent.iterdir()} - {recipe.step(STEP).folder}
    return read_manifest(other).fingerprint
