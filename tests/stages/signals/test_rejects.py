"""Rows that cannot be scored: rejected with a reason, listed and counted, never replaced."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, RejectLimitError
from schemas.sample_id import sample_id_of
from schemas.storage.manifest import read_manifest
from schemas.storage.shards import read_shard
from schemas.tables.documents import DOCUMENTS
from stages.models.engines.sequences import require_room
from stages.models.spec import EngineOptions
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.stage import Rejected
from tests.conftest import save_tiny_model
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, make_recipe, teachercache
from tests.fixtures.tiny_teacher import (
    CLOSE,
    ENCODINGS,
    LENGTHS,
    Teacher,
    as_document,
    real_documents,
    shard_of,
    stage_of,
)

NUM_PARAGRAPHS = 40


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def teacher(tiny_model: Path, paragraphs: list[str]) -> Teacher:
    return Teacher(tiny_model, 512, real_documents(tiny_model, paragraphs), [], [])


@pytest.fixture(params=ENCODINGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.slow
def test_documents_longer_than_the_models_window_are_rejected_and_the_rest_keep_their_rows(
    teacher: Teacher, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher.folder, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 18}))
    results = replace(teacher, folder=folder).rows("top_k", tmp_path)
    whole = teacher.rows("top_k", tmp_path)
    for row, result, length in zip(whole, results, LENGTHS, strict=True):
        if length > 18:
            reason = "longer than the model's window of 18 tokens"
            assert result == Rejected(row.sample_id, reason)
        else:
            assert result.sample_id == row.sample_id
            np.testing.assert_allclose(result.logprobs_PK, row.logprobs_PK, **CLOSE)


def test_an_execution_setting_never_decides_which_rows_there_are(
    teacher: Teacher, tmp_path: Path
) -> None:
    context = teacher.context(tmp_path)
    options = context.engine.model_copy(update={"max_model_len": 39})
    expected = r"max_model_len is 39, a row has 40 tokens: raise it"
    with (
        stage_of("top_k").open(replace(context, engine=options)) as work,
        pytest.raises(ConfigError, match=expected),
    ):
        work(shard_of(teacher.documents, teacher.vocab_size))


def test_a_setting_that_leaves_the_window_whole_rejects_as_no_setting_does(
    teacher: Teacher, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher.folder, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 18}))
    context = replace(teacher, folder=folder).context(tmp_path)
    for max_model_len in (18, 1000):
        options = context.engine.model_copy(update={"max_model_len": max_model_len})
        with stage_of("top_k").open(replace(context, engine=options)) as work:
            results = list(work(shard_of(teacher.documents, teacher.vocab_size)))
        rejected = [row for row in results if isinstance(row, Rejected)]
        assert len(rejected) == sum(length > 18 for length in LENGTHS) > 0


def test_a_row_that_memory_keeps_out_is_refused_with_what_gives_it_more() -> None:
    engine = SimpleNamespace(max_length=100, window=200)
    require_room(engine, 100, EngineOptions())
    with pytest.raises(ConfigError, match=r"holds 100 tokens of a row, a row has 101: give it"):
        require_room(engine, 101, EngineOptions())


POISON = 7  # a byte token outside the ids that the start-up check uses


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which one token's embedding is not a number."""
    folder = save_tiny_model(tmp_path_factory.mktemp("nan"), vocab_size=512, tie=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_row_that_is_not_finite_is_rejected_and_its_neighbours_are_not(
    poisoned: Path, kind: str, tmp_path: Path
) -> None:
    good, bad = np.arange(100, 120), np.arange(100, 121)
    bad[15] = POISON
    teacher = Teacher(poisoned, 512, [as_document(ids_T) for ids_T in (bad, good)], [], [])
    rejected, row = teacher.rows(kind, tmp_path)
    reason = "hidden state outside float16" if kind.startswith("exact") else "non-finite logits"
    assert rejected == Rejected(sample_id_of(bad), reason)
    assert row.sample_id == sample_id_of(good)
    assert np.isfinite(row.next_token_logprobs_P).all()


def test_hidden_states_too_large_for_float16_are_rejected_only_where_they_are_kept(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Scaling the last norm up and the head down leaves every logit as it was."""
    folder = save_tiny_model(tmp_path / "large", vocab_size=512, tie=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 2.0**20
    tensors["lm_head.weight"] *= 2.0**-20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    teacher = Teacher(folder, 512, [as_document(np.arange(100, 120))], [], [])
    (exact,) = teacher.rows("exact", tmp_path)
    (threshold,) = teacher.rows("threshold", tmp_path)
    assert exact.reason == "hidden state outside float16"
    assert np.isfinite(threshold.entropies_P).all() and threshold.num_positions == 19


def test_more_entries_than_tokens_are_refused(teacher: Teacher, tmp_path: Path) -> None:
    body = {"stage": "teacher_logits", "input": "d", "model": "m"}
    encoding = {"kind": "top_k", "k": teacher.vocab_size + 1}
    stage = TeacherLogitsStage.model_validate({**body, "encoding": encoding})
    with pytest.raises(ConfigError, match=r"encoding\.k is \d+, the vocabulary has \d+ tokens"):
        stage.bind(teacher.context(tmp_path))


# The pipeline: documents of their own lengths, against a model with a window of 40 tokens.


@pytest.fixture
def ragged(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    model = shutil.copytree(tiny_model, tmp_path / "short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    texts = [text[: 40 + 5 * i] for i, text in enumerate(paragraphs[:NUM_PARAGRAPHS])]
    recipe = make_recipe(tmp_path / "ragged", model, texts)
    edit_recipe(recipe, "steps", "documents", "mode", value="truncate")
    edit_recipe(recipe, "steps", "documents", "tokenizer", value=str(tiny_model))
    return recipe


def test_rows_that_cannot_be_scored_are_rejected_listed_and_counted(ragged: TinyRecipe) -> None:
    ragged.run("steps.signals.max_rejected_fraction=1.0")
    documents, signals = (step.folder for step in ragged.plan())
    reason = "longer than the model's window of 40 tokens"
    manifest, source = read_manifest(signals), read_manifest(documents)
    total = 0
    for shard, given in zip(manifest.shards, source.shards, strict=True):
        content = read_shard(documents / given.file)
        rows = [row for batch in content.to_batches() for row in DOCUMENTS.rows(batch)]
        long = [row.sample_id for row in rows if len(row.input_ids_T) > 40]
        listed = signals / f"{shard.name}.rejects.jsonl"
        lines = [json.loads(line) for line in listed.read_text().splitlines()] if long else []
        assert lines == [{"reason": reason, "sample_id": sample_id} for sample_id in long]
        assert listed.is_file() == bool(long)
        assert shard.rejects == ({reason: len(long)} if long else {})
        assert shard.num_rows == len(rows) - len(long)
        kept = read_shard(signals / shard.file)["sample_id"].to_pylist()
        assert kept == [row.sample_id for row in rows if len(row.input_ids_T) <= 40]
        total += len(long)
    assert 0 < total < source.num_rows and manifest.rejects == {reason: total}
    assert open_dataset([documents, signals]).num_missing == total
    assert teachercache("verify", ragged.root).code == 0
    status = teachercache("status", ragged.path, "--set", "steps.signals.max_rejected_fraction=1")
    assert str(total) in status.out


def test_too_many_rejects_fail_the_shard_with_code_3_and_leave_nothing_half_written(
    ragged: TinyRecipe,
) -> None:
    said = teachercache("run", ragged.path)
    assert said.code == 3 == RejectLimitError.exit_code
    assert "rows were rejected, more than max_rejected_fraction 0.01: " in said.error
    assert "'longer than the model's window of 40 tokens', first sample " in said.error
    folder = ragged.step("signals").folder
    failed = said.error.split(":")[0].removeprefix(f"{folder}/")
    names = {path.name for path in folder.iterdir()}
    assert failed.startswith("shard-") and not {n for n in names if n.startswith(failed)}
    assert not {n for n in names if "tmp" in n or n == "manifest.json"}
    assert {n.split(".")[0] for n in names if n.endswith(".arrow")} == {
        n.split(".")[0] for n in names if n.endswith(".json")
    }
    again = teachercache("run", ragged.path, "--set", "steps.signals.max_rejected_fraction=1.0")
    assert again.code == 0  # the same folder: how many may fail moves no byte
    assert read_manifest(folder).fingerprint == ragged.step("signals").fingerprint


def test_logits_that_are_not_finite_are_rejected(paragraphs: list[str], tmp_path: Path) -> None:
    """One embedding is not a number: rows with that byte fail, and only those."""
    model = save_tiny_model(tmp_path / "model", vocab_size=512, tie=False)
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    poison = vocabulary["Z"]
    assert poison < 64  # outside the ids of the engine's start-up check
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][poison] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    texts = [("Z " if i % 4 == 0 else "") + text for i, text in enumerate(paragraphs[:20])]
    recipe = make_recipe(tmp_path / "recipe", model, texts)
    edit_recipe(recipe, "steps", "documents", "mode", value="truncate")
    recipe.run("steps.signals.max_rejected_fraction=0.9")
    documents = open_dataset([recipe.step("documents").folder])
    bad = {
        row["sample_id"]
        for row in (documents[i] for i in range(len(documents)))
        if poison in row["input_ids_T"]
    }
    manifest = read_manifest(recipe.step("signals").folder)
    assert len(bad) >= 5 and manifest.rejects == {"non-finite logits": len(bad)}
    assert manifest.num_rows == len(documents) - len(bad)


@pytest.mark.slow
def test_what_goes_wrong_in_a_worker_reaches_the_user_as_it_is(ragged: TinyRecipe) -> None:
    said = teachercache("run", ragged.path, "--set", "execution.workers=2")
    assert said.code == 3 and "rows were rejected, more than" in said.error
    broken = ("steps.signals.encoding={kind: top_k, k: 600}", "execution.workers=2")
    said = teachercache("run", ragged.path, "--set", broken[0], "--set", broken[1])
    assert said.code == 2
    assert said.error == "encoding.k is 600, the vocabulary has 512 tokens: lower k"
