"""Documents begin with what the tokenizer itself puts first, and are scored as text with a BOS."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from pipeline.planning.plan import make_plan
from pipeline.planning.recipe import Recipe
from schemas.errors import ConfigError
from schemas.tables.documents import Document
from stages.sources.documents.stage import IngestStage
from tests.fixtures.tiny_teacher import CLOSE, Teacher

LENGTH = 24
BOS = "<bos>"


@pytest.fixture(scope="module")
def with_bos(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its last token a BOS that the tokenizer puts first, as Gemma's does."""
    folder = tmp_path_factory.mktemp("with_bos") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    body = json.loads(tokenizer.to_str())
    last = next(token for token, i in body["model"]["vocab"].items() if i == 511)
    body["model"]["merges"] = [m for m in body["model"]["merges"] if "".join(m) != last]
    body["model"]["vocab"] = {k: i for k, i in body["model"]["vocab"].items() if i != 511}
    tokenizer = Tokenizer.from_str(json.dumps(body))
    tokenizer.add_special_tokens([BOS])
    assert tokenizer.token_to_id(BOS) == 511
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 511)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def texts(paragraphs: list[str]) -> list[str]:
    return [text[:90] for text in paragraphs[:12]]


def stage_for(folder: Path, path: Path, texts: Sequence[str], **changes: Any) -> IngestStage:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings: dict[str, Any] = {
        "stage": "ingest",
        "source": {"kind": "jsonl", "paths": [str(path)]},
        "tokenizer": str(folder),
        "length": LENGTH,
        "mode": "truncate",
        "heldout_fraction": 0.0,
    }
    return IngestStage.model_validate(settings | changes)


def rows_of(stage: IngestStage, work_dir: Path) -> list[Document]:
    prepared = stage.work.prepare(stage, work_dir)
    return [row for i in range(len(prepared.shards)) for row in stage.read(work_dir, i)]


def test_truncated_rows_are_the_tokenizers_own_encoding(
    with_bos: Path, texts: list[str], tmp_path: Path
) -> None:
    stage = stage_for(with_bos, tmp_path / "a.jsonl", [*texts, "a"])
    own = Tokenizer.from_file(str(with_bos / "tokenizer.json"))
    expected = [own.encode(text).ids[:LENGTH] for text in [*texts, "a"]]  # <bos> a: one position
    assert sorted(row.input_ids_T.tolist() for row in rows_of(stage, tmp_path / "work")) == sorted(
        expected
    )


def test_packed_rows_are_a_bos_and_pieces_of_the_stream(
    with_bos: Path, texts: list[str], tmp_path: Path
) -> None:
    def rows(**changes: Any) -> list[list[int]]:
        name = "-".join(map(str, changes.values()))
        stage = stage_for(with_bos, tmp_path / "a.jsonl", texts, mode="pack", **changes)
        return sorted(row.input_ids_T.tolist() for row in rows_of(stage, tmp_path / name))

    bare = rows(bos="never", length=LENGTH - 1)
    assert not any(511 in row for row in bare)
    expected = [[511, *row] for row in bare]
    assert expected == rows(bos="tokenizer", length=LENGTH) and len(expected) > 5


def test_a_tokenizer_that_puts_nothing_first_keeps_bytes_and_names(
    tiny_model: Path, with_bos: Path, texts: list[str], tmp_path: Path
) -> None:
    def fingerprint(folder: Path, **changes: Any) -> str:
        stage = stage_for(folder, tmp_path / "a.jsonl", texts, **changes)
        steps = {"documents": stage.model_dump(mode="json")}
        recipe = {"name": "r", "models": {}, "steps": steps, "execution": {"root": str(tmp_path)}}
        (step,) = make_plan(Recipe.model_validate(recipe))
        work = tmp_path / step.fingerprint
        begins = {row.input_ids_T[0] == 511 for row in rows_of(stage, work)}
        assert begins == {"bos" in step.identity["config"]}
        return step.fingerprint

    assert fingerprint(tiny_model) == fingerprint(tiny_model, bos="never")
    assert fingerprint(with_bos) != fingerprint(with_bos, bos="never")
    assert fingerprint(with_bos) != fingerprint(tiny_model)


@pytest.mark.slow
def test_a_teachers_numbers_are_those_of_text_with_a_bos(
    with_bos: Path, texts: list[str], tmp_path: Path
) -> None:
    """Every position, the first token's after the BOS too, against a float64 forward pass."""
    documents = rows_of(stage_for(with_bos, tmp_path / "a.jsonl", texts), tmp_path / "work")
    own = Tokenizer.from_file(str(with_bos / "tokenizer.json"))
    by_ids = {tuple(ids): ids for ids in (own.encode(text).ids[:LENGTH] for text in texts)}
    model: Any = AutoModelForCausalLM.from_pretrained(with_bos, dtype=torch.float64)
    rows = Teacher(with_bos, 512, documents, [], []).rows("top_k", tmp_path)
    for document, row in zip(documents, rows, strict=True):
        ids_T = torch.tensor(by_ids[tuple(document.input_ids_T.tolist())])
        with torch.no_grad():
            logprobs_PV = model(ids_T[None]).logits[0, :-1].log_softmax(-1)
        expected_P = logprobs_PV.gather(1, ids_T[1:, None])[:, 0].numpy()
        np.testing.assert_allclose(row.next_token_logprobs_P, expected_P, **CLOSE)
        with torch.no_grad():
            bare_P = model(ids_T[None, 1:]).logits[0, :-1].log_softmax(-1)
        without_P = bare_P.gather(1, ids_T[2:, None])[:, 0].numpy()
        assert np.abs(row.next_token_logprobs_P[1:] - without_P).mean() > 0.05


def test_what_cannot_begin_a_row_is_refused_in_one_line(
    tiny_model: Path, with_bos: Path, texts: list[str], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    shutil.copytree(with_bos, small)
    (small / "config.json").write_text('{"model_type": "llama", "vocab_size": 500}')
    path = tmp_path / "a.jsonl"
    wrong = [
        (stage_for(tiny_model, path, texts, bos="always"), "has no beginning-of-sequence token"),
        (stage_for(small, path, texts), "would begin with token 511, but the model .* 500"),
    ]
    for stage, said in wrong:
        with pytest.raises(ConfigError, match=said):
            stage.work.prepare(stage, tmp_path / "work")
