"""``teachercache extend``: rows of finished tables are copied, the teacher works on the others."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from pipeline.planning.plan import make_plan
from pipeline.reports.step_times import measured_time
from pipeline.steps import extension, predecessors, wanted_rows
from pipeline.steps.run import run_plan
from schemas.open_table import open_table
from schemas.storage.manifest import damaged_shards, read_manifest
from stages.signals.scoring import states as scored_states
from stages.signals.teacher_logits import work as teacher_work
from stages.stage import Rejected
from tests.fixtures.tiny_recipe import (
    Events,
    TinyRecipe,
    edit_recipe,
    finish,
    make_recipe,
    start,
    table_bytes,
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
    states = scored_states.document_states

    def noted(engine: Any, shard: Any) -> Any:
        seen.extend(shard["sample_id"].to_pylist())
        return states(engine, shard)

    monkeypatch.setattr(scored_states, "document_states", noted)
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
    new, made = copied.step(STEP), measured_time(old.folder, read_manifest(old.folder))
    assert made.seconds and made.positions_per_s
    assert measured_time(new.folder, read_manifest(new.folder)).seconds is None, "a copy's is none"


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
    [
        (("encoding", "k"), 9),
        (("encoding",), {"kind": "top_k", "k": 8}),
        (("encoding",), {"kind": "threshold"}),
        (("seed",), 3),
    ],
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


def another_model(recipe: TinyRecipe, folder: Path) -> Path:
    """Make a copy of the teacher's folder the teacher."""
    old = recipe.load().models["teacher"].folder
    shutil.copytree(old, folder)
    edit_recipe(recipe, "models", "teacher", "path", value=str(folder))
    return folder


def other_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = min(weights)
    save_file({**weights, name: weights[name] * 1.001}, file, {"format": "pt"})


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def other_vocabulary(folder: Path) -> None:
    """The same number of tokens, two of which have changed places."""
    file = folder / "tokenizer.json"
    body = json.loads(file.read_text())
    vocabulary = body["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(body))


def no_change(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "num_new"),
    [
        (other_weights, 20),
        pytest.param(other_template, 20, marks=pytest.mark.slow),
        pytest.param(other_vocabulary, 20, marks=pytest.mark.slow),
        pytest.param(no_change, 0, marks=pytest.mark.slow),
    ],
)
def test_another_teacher_or_tokenizer_is_no_predecessor(
    copied: TinyRecipe,
    worked: list[str],
    paragraphs: list[str],
    tmp_path: Path,
    change: Callable[[Path], None],
    num_new: int,
) -> None:
    change(another_model(copied, tmp_path / "model"))
    with_texts(copied, paragraphs[:20])
    extend(copied)
    assert len(worked) == num_new and len(rows_of(copied)) == 20


@pytest.mark.slow
def test_a_teacher_in_another_dtype_is_no_predecessor(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str]
) -> None:
    edit_recipe(copied, "models", "teacher", "dtype", value="bfloat16")
    with_texts(copied, paragraphs[:20])
    extend(copied)
    assert len(worked) == 20


@pytest.mark.slow
def test_a_table_of_other_rows_by_the_same_settings_is_passed_over(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str]
) -> None:
    """Its input is there and of another kind: nothing to warn of."""
    body = yaml.safe_load(copied.path.read_text())
    body["steps"]["shown"] = {"stage": "demonstrations", "input": "documents"}
    body["steps"]["shown_signals"] = {**body["steps"][STEP], "input": "shown"}
    copied.path.write_text(yaml.safe_dump(body, sort_keys=False))
    copied.run()
    worked.clear()
    with_texts(copied, paragraphs[:33])
    events = extend(copied)
    assert len(worked) == 3 and events.warnings == []
    assert len(rows_of(copied, "shown_signals")) == 33


@pytest.mark.slow
def test_of_many_earlier_tables_no_more_are_read_than_serve(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stop in (31, 32):  # as night after night
        with_texts(copied, paragraphs[:stop])
        extend(copied)
    last = copied.step("documents").folder
    hashed: list[Path] = []
    damaged = damaged_shards

    def noted(folder: Path, manifest: Any) -> list[str]:
        hashed.append(folder)
        return damaged(folder, manifest)

    monkeypatch.setattr(predecessors, "damaged_shards", noted)
    with_texts(copied, paragraphs[:28])
    read = read_inputs(monkeypatch)
    extend(copied)
    assert read == {last, copied.step("documents").folder} and len(hashed) == 1
    assert len(worked) == 2  # of the two nights before


def read_inputs(patch: pytest.MonkeyPatch) -> set[Path]:
    """The folders of inputs whose rows are looked at from now on."""
    found: set[Path] = set()
    rows_of_shard = wanted_rows.rows_of

    def noted(place: Path, shard: Any) -> Any:
        found.add(place)
        return rows_of_shard(place, shard)

    patch.setattr(wanted_rows, "rows_of", noted)
    return found


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
    monkeypatch.setattr(wanted_rows, "_digest", lambda values: next(digests))
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


def test_what_a_begun_extension_copies_is_needed(
    copied: TinyRecipe, worked: list[str], paragraphs: list[str]
) -> None:
    """`gc` between a kill and the next run leaves it the earlier table; later that may go."""
    earlier = [copied.step(name).folder for name in ("documents", STEP)]
    with_texts(copied, paragraphs[:33])
    with pytest.MonkeyPatch.context() as patch:

        def killed(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(extension, "_put_together", killed)
        with pytest.raises(KeyboardInterrupt):
            extend(copied)
    clean = ("gc", copied.root, "--keep", copied.path, "--delete")
    assert teachercache(*clean).code == 0
    assert all(folder.is_dir() for folder in earlier)
    extend(copied)
    assert len(worked) == 3
    after = rows_of(copied)
    assert teachercache(*clean).code == 0
    assert not any(folder.exists() for folder in earlier)
    assert list(rows_of(copied)) == list(after) and len(after) == 33


def test_what_a_kill_left_of_a_finished_extension_goes(copied: TinyRecipe) -> None:
    left = copied.step(STEP).folder / ".extend" / "made"
    left.mkdir(parents=True)
    copied.run()
    assert not left.parent.exists()


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


def shards_in(folder: Path) -> int:
    return len([*folder.glob("shard-*.json")])


@pytest.mark.slow
@pytest.mark.parametrize("part", [".extend/made", "."])
def test_an_extension_that_was_killed_has_the_bytes_of_one_that_was_not(
    copied: TinyRecipe, paragraphs: list[str], tmp_path: Path, part: str
) -> None:
    """SIGKILL while new rows are made, and while shards are put together."""
    env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    edit_recipe(copied, "steps", "documents", "rows_per_shard", value=2)
    with_texts(copied, paragraphs[:30])
    copied.run()
    whole = copied.copy(tmp_path / "whole")
    for recipe in (copied, whole):
        with_texts(recipe, paragraphs[:45])
    assert finish(start("extend", whole.path, **env)).code == 0
    folder = copied.step(STEP).folder
    killed = start("extend", copied.path, **env)
    while killed.poll() is None and not shards_in(folder / part):
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert shards_in(folder / part) and not (folder / "manifest.json").exists()
    said = finish(start("extend", copied.path, **env))
    assert said.code == 0, said.err
    assert "15 of 45 rows are new" in said.out
    assert table_bytes(folder) == table_bytes(whole.step(STEP).folder)
    assert not (folder / ".extend").exists()


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
