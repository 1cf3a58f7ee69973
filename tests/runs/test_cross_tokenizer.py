"""From text to a student of another tokenizer: a recipe, its manifest, numbers and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, IdentityMismatch
from schemas.storage.manifest import read_manifest
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.models.checkpoints.token_bytes import ByteTokenizer
from stages.models.checkpoints.tokenizer_identity import num_token_ids
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    edit_recipe,
    error_of,
    make_recipe,
    table_bytes,
    teachercache,
)
from tests.fixtures.tokenizer_kinds import save_kind

TRAIN: dict[str, Any] = {
    **{"stage": "train", "student": "student", "data": ["spans"], "max_steps": 2},
    "per_device_batch_size": 4,
}


def steps_on(tokenizer: Path) -> dict[str, Any]:
    return {
        "spans": {
            "stage": "aligned_spans",
            "input": "signals",
            "documents": "documents",
            "teacher": "teacher",
            "tokenizer": str(tokenizer),
        },
        "student": {
            "stage": "student_init",
            "model": "teacher",
            "layers": [0],
            "tokenizer": str(tokenizer),
        },
        "matched": {**TRAIN, "objective": {"loss": "alm", "weight": 0.5}},
        "text_alone": {**TRAIN, "objective": {"loss": "cross_entropy"}},
        "results": {
            "stage": "evaluate",
            "students": ["matched", "text_alone"],
            "data": ["spans"],
        },
    }


@pytest.fixture
def recipe(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    other = save_kind(tmp_path / "other", "metaspace", "LlamaTokenizer")
    return make_recipe(tmp_path, tiny_model, paragraphs[:40], more_steps=steps_on(other))


@pytest.mark.slow
def test_a_student_of_another_tokenizer_is_trained_and_measured(
    recipe: TinyRecipe, tiny_model: Path
) -> None:
    said = teachercache("run", recipe.path)
    assert said.code == 0, said.err
    spans = recipe.step("spans")
    manifest = read_manifest(spans.place)
    size = num_token_ids(recipe.path.parent / "other")
    assert (manifest.table, manifest.vocab_size) == ("aligned_spans", size)
    share = manifest.measures["share_of_bytes"]
    assert 0.9 < share < 1.0 and f"share_of_bytes {share:.6g}" in said.out
    assert "bits per byte" in said.out
    documents = read_manifest(recipe.step("documents").place)
    assert manifest.num_rows == documents.num_rows and not manifest.rejects
    # Every row is the text of its document, in the other's tokens.
    one = ByteTokenizer(tiny_model)
    other = ByteTokenizer(recipe.path.parent / "other")
    texts = {}
    for split in ("train", "heldout"):
        dataset = open_dataset([recipe.step("documents").place], split=split)
        for index in range(len(dataset)):
            row = dataset[index]
            texts[row["sample_id"]] = bytes_of(one, row["input_ids_T"])
        dataset = open_dataset([spans.place], split=split)
        for index in range(len(dataset)):
            row = dataset[index]
            expected = texts[row["source_id"]].decode(errors="ignore").split()
            assert bytes_of(other, row["input_ids_T"]).decode().split() == expected
    record = read_checkpoint(recipe.step("results").place)
    assert record is not None
    for name in ("matched", "text_alone"):
        trained = read_checkpoint(recipe.step(name).place)
        assert trained is not None
        after = trained.metrics["after"]
        assert after["bits_per_byte"] == pytest.approx(record.metrics[name]["bits_per_byte"])
        assert after["bits_per_byte"] != trained.metrics["before"]["bits_per_byte"]
        assert any("alm" in entry for entry in trained.history) == (name == "matched")
    # The same bytes when the table is made again, and nothing when the recipe is run again.
    before = table_bytes(spans.folder)
    for path in spans.folder.glob("*"):
        path.unlink()
    assert teachercache("run", recipe.path).code == 0
    assert table_bytes(spans.folder) == before
    body = json.loads((spans.folder / "manifest.json").read_text())
    assert body["measures"] == dict(manifest.measures)
    assert teachercache("verify", spans.folder).code == 0


def bytes_of(tokenizer: ByteTokenizer, ids: np.ndarray) -> bytes:
    return b"".join(tokenizer.bytes_of.get(int(index), b" ") for index in ids)


def test_names_follow_the_tokenizer_and_not_the_student(recipe: TinyRecipe) -> None:
    """The spans are of a tokenizer: other layers of a student leave them as they are."""
    before = recipe.step("spans").fingerprint
    edit_recipe(recipe, "steps", "student", "layers", value=[1])
    assert recipe.step("spans").fingerprint == before
    folder = recipe.path.parent / "another"
    save_kind(folder, "byte_level", "PreTrainedTokenizerFast")
    edit_recipe(recipe, "steps", "student", "tokenizer", value=str(folder))
    error = error_of(recipe)
    assert isinstance(error, IdentityMismatch)
    assert str(error).startswith("steps.matched: step 'spans' holds ids of vocabulary")
    edit_recipe(recipe, "steps", "spans", "tokenizer", value=str(folder))
    assert recipe.step("spans").fingerprint != before


def test_the_teacher_has_to_be_that_of_the_documents(recipe: TinyRecipe) -> None:
    edit_recipe(recipe, "models", "third", value={"path": str(recipe.path.parent / "other")})
    edit_recipe(recipe, "steps", "spans", "tokenizer", value="nowhere")
    error = error_of(recipe)
    assert isinstance(error, ConfigError)
    assert str(error).startswith(
        "steps.spans.tokenizer: 'nowhere' is neither under 'models' nor a folder"
    )


def test_a_student_keeps_its_tokenizer_unless_told_otherwise(recipe: TinyRecipe) -> None:
    """Recipes of before have the names they had: an unset tokenizer is in no identity."""
    edit_recipe(
        recipe, "steps", "plain", value={"stage": "student_init", "model": "teacher", "layers": [0]}
    )
    step = recipe.step("plain")
    assert step.identity["config"] == {"layers": [0]}
    assert "vocab_size" not in step.identity
    assert (
        step.vocabulary == recipe.step("documents").vocabulary != recipe.step("student").vocabulary
    )
