"""The ``token_entropies`` stage against one plain float64 pass a row, and what it rejects.

Dimensions: T = tokens of a row, P = scored positions, V = vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from schemas.sample_id import sample_id_of
from schemas.scored_spans import span_targets
from schemas.tables.conversations import CONVERSATIONS, Conversation
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.token_entropies import TOKEN_ENTROPIES, TokenEntropies
from stages.signals.token_entropies.stage import TokenEntropiesStage
from stages.stage import Rejected
from tests.fixtures.cached_data import VOCAB_SIZE, make_conversations, make_documents, save_model
from tests.fixtures.tiny_responses import context_of

STAGE = TokenEntropiesStage(stage="token_entropies", input="text", model="student")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a window of 64 tokens."""
    folder = tmp_path_factory.mktemp("models") / "student"
    save_model(folder, seed=3, num_layers=2)
    return folder


def found(folder: Path, out: Path, rows: list[Any]) -> list[Any]:
    table = CONVERSATIONS if isinstance(rows[0], Conversation) else DOCUMENTS
    batch = table.bind(vocab_size=VOCAB_SIZE).to_batch(rows)
    with STAGE.open(context_of(out, VOCAB_SIZE, {"student": folder})) as work:
        return list(work(pa.Table.from_batches([batch])))


@torch.no_grad()
def plain_entropies(folder: Path, ids_T: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """[T - 1] by the definition, float64."""
    model: Any = LlamaForCausalLM.from_pretrained(folder).double().eval()
    logits_TV = model(torch.from_numpy(ids_T.astype(np.int64))[None]).logits[0, :-1]
    logprobs_PV = logits_TV.log_softmax(-1).numpy()
    return np.asarray(-(np.exp(logprobs_PV) * logprobs_PV).sum(axis=1))


def as_document(ids_T: npt.NDArray[Any]) -> Document:
    return Document(sample_id=sample_id_of(ids_T), split="train", input_ids_T=ids_T)


def test_entropies_are_those_of_a_plain_pass(folder: Path, tmp_path: Path) -> None:
    documents = make_documents()[:8]
    for document, row in zip(documents, found(folder, tmp_path, documents), strict=True):
        assert isinstance(row, TokenEntropies) and row.sample_id == document.sample_id
        expected_P = plain_entropies(folder, document.input_ids_T)
        assert row.num_positions == len(document.input_ids_T) - 1
        np.testing.assert_allclose(row.token_entropies_P, expected_P, atol=2e-5)


def test_of_conversations_the_tokens_of_the_spans_are_measured(
    folder: Path, tmp_path: Path
) -> None:
    chats = make_conversations()[:6]
    for chat, row in zip(chats, found(folder, tmp_path, chats), strict=True):
        targets_P = span_targets(chat.scored_S2)
        expected_P = plain_entropies(folder, chat.input_ids_T)[targets_P - 1]
        np.testing.assert_allclose(row.token_entropies_P, expected_P, atol=2e-5)


def test_rows_that_cannot_be_measured_are_rejected_one_by_one(folder: Path, tmp_path: Path) -> None:
    """One is longer than the window, one meets a weight that is no number; the third is kept."""
    poisoned, bad = tmp_path / "poisoned", 299
    save_model(poisoned, seed=3, num_layers=2)
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][bad] = float("nan")
    config = poisoned / "config.json"
    config.write_text(config.read_text().replace('embeddings": true', 'embeddings": false'))
    save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    texts = [np.arange(1, 66), np.array([1, bad, 3, 4]), np.arange(5, 15)]
    long, broken, kept = map(as_document, texts)
    rows = found(poisoned, tmp_path / "out", [long, broken, kept])
    assert rows[0] == Rejected(long.sample_id, "longer than the model's window of 64 tokens")
    assert rows[1] == Rejected(broken.sample_id, "non-finite logits")
    assert isinstance(rows[2], TokenEntropies) and rows[2].sample_id == kept.sample_id


def test_what_is_stored_is_the_nearest_float16(folder: Path, tmp_path: Path) -> None:
    (row,) = found(folder, tmp_path, make_documents()[:1])
    (back,) = TOKEN_ENTROPIES.rows(TOKEN_ENTROPIES.bind(vocab_size=VOCAB_SIZE).to_batch([row]))
    expected_P = row.token_entropies_P.astype(np.float16)
    np.testing.assert_array_equal(back.token_entropies_P, expected_P)


def test_the_estimate_counts_scored_positions(folder: Path, tmp_path: Path) -> None:
    """Of documents every token but the first of a row."""

    class Input:
        table, num_rows, num_tokens, num_positions = "documents", 4, 100, 0

    assert STAGE.estimate(Input, hidden_size=32).num_positions == 96  # type: ignore[arg-type]
    Input.table, Input.num_positions = "conversations", 30
    assert STAGE.estimate(Input, hidden_size=32).num_positions == 30  # type: ignore[arg-type]
