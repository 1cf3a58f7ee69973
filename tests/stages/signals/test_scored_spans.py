"""Teacher distributions on spans of a row: the tokens that the row names, and no others.

Dimensions: P = scored positions of a row.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from schemas.errors import ConfigError, StoreError
from schemas.scored_spans import scored_targets, span_targets
from schemas.tables.demonstrations import Demonstrated
from stages.stage import Rejected
from stages.student.batches.signals import Collator
from tests.fixtures.cached_data import VOCAB_SIZE, save_model
from tests.fixtures.demonstration_data import context_of, cut, kept, shard_of
from tests.fixtures.tiny_teacher import ENCODINGS, sampled_of, stage_of

CLOSE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3}
COARSE: dict[str, Any] = {"rtol": 1 / 128 + 2e-3, "atol": 2e-3}  # 7 significant bits


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_model(folder, seed=1, num_layers=2)
    return folder


def made_rows() -> list[Demonstrated]:
    """Rows of documents and of episodes, and one with two spans of its own."""
    rows = [*kept(cut("documents"))[:3], *kept(cut("episodes", teacher_tokens=25))[:4]]
    last = rows[0]
    first, end = last.query_start + 1, len(last.input_ids_T)
    return [*rows, replace(last, scored_S2=np.array([[first, first + 1], [end - 1, end]]))]


def run(teacher: Path, rows: list[Demonstrated], out: Path, kind: str, **options: Any) -> Any:
    with stage_of(kind).open(context_of(teacher, out, **options)) as work:
        return list(work(shard_of(rows)))


@pytest.mark.parametrize("kind", ENCODINGS)
def test_entries_are_those_of_a_whole_forward_at_the_spans(
    teacher: Path, tmp_path: Path, kind: str
) -> None:
    rows = made_rows()
    model = LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()
    within = COARSE if kind.startswith("threshold") else CLOSE
    for row, found in zip(rows, run(teacher, rows, tmp_path, kind), strict=True):
        targets_P = span_targets(row.scored_S2)
        ids_T = torch.from_numpy(np.asarray(row.input_ids_T, np.int64))
        with torch.no_grad():
            output = model(input_ids=ids_T[None], output_hidden_states=True)
        logprobs_PV = output.logits[0, targets_P - 1].log_softmax(-1)
        next_P = logprobs_PV.gather(1, ids_T[targets_P][:, None])[:, 0]
        entropies_P = -(logprobs_PV.exp() * logprobs_PV).sum(-1)
        assert (found.sample_id, found.first_target) == (row.sample_id, targets_P[0])
        np.testing.assert_allclose(found.next_token_logprobs_P, next_P, **within)
        np.testing.assert_allclose(found.entropies_P, entropies_P, **within)
        if kind.startswith("exact"):
            hidden_PD = output.hidden_states[-1][0, targets_P - 1]
            np.testing.assert_allclose(found.hidden_PD, hidden_PD, atol=2e-2, rtol=2e-2)
        elif kind == "top_k":
            top_PK = logprobs_PV.topk(found.logprobs_PK.shape[1]).values
            np.testing.assert_allclose(found.logprobs_PK, top_PK, atol=2e-2)
        else:
            np.testing.assert_allclose(sampled_of(found)[1].sum(1), 1.0, atol=1e-5)


def test_a_row_that_cannot_be_scored_costs_itself_alone(teacher: Path, tmp_path: Path) -> None:
    """A window of 64 tokens, of which the last scored one needs not be read; ids up to 307."""
    fine, longest, strange = made_rows()[:3]
    ids_T = np.arange(1, 67)
    whole: dict[str, Any] = {"query_start": 50, "answer_start": 66, "input_ids_T": ids_T}
    whole |= {"distiller_ids_L": ids_T[:50], "demonstration_ends_M": np.array([50])}
    rows = [
        fine,
        replace(longest, **whole, scored_S2=np.array([[51, 66]])),
        replace(longest, **whole, scored_S2=np.array([[51, 65]]), sample_id="5" * 24),
        replace(strange, input_ids_T=np.where(strange.input_ids_T >= 0, 400, 0)),
    ]
    found = run(teacher, rows, tmp_path, "threshold")
    assert [isinstance(row, Rejected) for row in found] == [False, True, False, True]
    assert found[1].reason == "longer than the model's window of 64 tokens"
    assert found[3].reason == f"token id 400 outside the teacher's vocabulary of {VOCAB_SIZE}"
    with pytest.raises(ConfigError, match=r"max_model_len is 8, a row has \d+ tokens"):
        run(teacher, rows, tmp_path, "threshold", max_model_len=8)


def test_batches_hold_the_spans_alone(teacher: Path, tmp_path: Path) -> None:
    """Labels, positions and the teacher's entries are about the same tokens."""
    rows = made_rows()
    signals = run(teacher, rows, tmp_path, "top_k")
    joined = [
        as_columns(row) | as_columns(signal) for row, signal in zip(rows, signals, strict=True)
    ]
    batch = Collator("top_k", VOCAB_SIZE)(joined)
    width = batch["input_ids"].shape[1]
    wanted = [(b, int(t)) for b, row in enumerate(rows) for t in span_targets(row.scored_S2)]
    assert batch["positions_N"].tolist() == [b * width + t - 1 for b, t in wanted]
    ids_N = [int(rows[b].input_ids_T[t]) for b, t in wanted]
    assert batch["next_token_ids_N"].tolist() == ids_N
    assert len(batch["rest_N"]) == len(wanted)
    assert int((batch["labels"] != -100).sum()) == len(wanted)


def test_signals_of_other_spans_are_refused(teacher: Path, tmp_path: Path) -> None:
    row = made_rows()[0]
    (signal,) = run(teacher, [row], tmp_path, "top_k")
    first, end = row.scored_S2[0].tolist()
    for spans in ([[first + 1, end]], [[first, end - 1]]):
        other = as_columns(row) | as_columns(signal) | {"scored_S2": np.array(spans)}
        with pytest.raises(StoreError, match=f"signals for {end - first} tokens from {first} on"):
            scored_targets(other)


def as_columns(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}
