"""Rows of ``teacher_logits`` against a dense float64 forward pass that shares no code with ours.

Dimensions: T = tokens, P = scored positions, V = vocabulary, K = kept entries, D = hidden width,
S = seeds.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from schemas.distribution import unpack_top_k
from schemas.tables.documents import Document
from schemas.tables.teacher_logits import (
    AnyLogits,
    ExactLogits,
    RoundedLogits,
    TauLogits,
    ThresholdLogits,
    TopKLogits,
)
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.engines.engine import Engine, open_engine
from stages.signals.scoring import logits
from tests.fixtures.tiny_teacher import (
    CLOSE,
    ENCODINGS,
    LENGTHS,
    F64Array,
    K,
    Teacher,
    real_documents,
    sampled_of,
    stage_of,
    weights_of,
)

NUM_DRAWS = 240
VOCABULARIES = {"tiny_model": 512, "tiny_model_large_vocab": 151_936}
# threshold rounds its two columns to 7 significant bits.
COARSE: dict[str, Any] = {"rtol": 1 / 128 + 2e-3, "atol": 2e-3}


@pytest.fixture(scope="module", params=VOCABULARIES)
def teacher(request: pytest.FixtureRequest, paragraphs: list[str]) -> Teacher:
    folder = request.getfixturevalue(request.param)
    documents = real_documents(folder, paragraphs)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logprobs_PV, hidden_PD = [], []
    with torch.no_grad():
        for document in documents:
            ids_BT = torch.from_numpy(document.input_ids_T.astype(np.int64))[None]
            out = model(input_ids=ids_BT, output_hidden_states=True)
            logprobs_PV.append(out.logits[0, :-1].log_softmax(-1).numpy())
            hidden_PD.append(out.hidden_states[-1][0, :-1].numpy())
    return Teacher(folder, VOCABULARIES[request.param], documents, logprobs_PV, hidden_PD)


@pytest.fixture(scope="module")
def engine(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    out = tmp_path_factory.mktemp("engine")
    options = teacher.context(out).engine
    with open_engine("transformers", teacher.folder, dtype="float32", options=options) as opened:
        yield opened


@pytest.fixture(scope="module", params=ENCODINGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def next_token_logprobs(document: Document, logprobs_PV: F64Array) -> F64Array:
    """log p(token t + 1 | tokens 0..t), written as the loop that defines it."""
    ids = document.input_ids_T.tolist()
    return np.array([logprobs_PV[t, ids[t + 1]] for t in range(len(ids) - 1)])


def test_every_row_has_its_documents_own_numbers(
    teacher: Teacher, engine: Engine, kind: str
) -> None:
    rows = teacher.draw(engine, kind)
    close = COARSE if kind.startswith("threshold") else CLOSE
    assert [row.sample_id for row in rows] == [d.sample_id for d in teacher.documents]
    for row, document, logprobs_PV in zip(
        rows, teacher.documents, teacher.logprobs_PV, strict=True
    ):
        expected_P = next_token_logprobs(document, logprobs_PV)
        entropies_P = -(np.exp(logprobs_PV) * logprobs_PV).sum(-1)
        assert (row.first_target, row.num_positions) == (1, len(document.input_ids_T) - 1)
        assert row.num_tokens == len(document.input_ids_T)
        np.testing.assert_allclose(row.next_token_logprobs_P, expected_P, **close)
        np.testing.assert_allclose(row.entropies_P, entropies_P, **close)


def test_entry_j_predicts_the_token_at_first_target_plus_j(
    teacher: Teacher, engine: Engine, kind: str
) -> None:
    """A slip of one position either way is far outside the tolerance of the test above."""
    for row, document, logprobs_PV in zip(
        teacher.draw(engine, kind), teacher.documents, teacher.logprobs_PV, strict=True
    ):
        targets_P = document.input_ids_T[row.first_target :].astype(np.int64)
        got_P = row.next_token_logprobs_P.astype(np.float64)
        own_P = np.take_along_axis(logprobs_PV, targets_P[:, None], 1)[:, 0]
        assert np.abs(got_P - own_P).max() < 0.1
        if len(targets_P) > 10:
            of_the_token_before_P = np.take_along_axis(
                logprobs_PV, document.input_ids_T[:-1].astype(np.int64)[:, None], 1
            )[:, 0]
            assert np.abs(got_P - of_the_token_before_P).mean() > 0.5
            assert np.abs(got_P[1:] - own_P[:-1]).mean() > 0.5


def test_threshold_keeps_the_head_exactly_and_the_rest_at_one_weight(
    teacher: Teacher, engine: Engine
) -> None:
    for row, logprobs_PV in zip(
        teacher.draw(engine, "threshold"), teacher.logprobs_PV, strict=True
    ):
        assert isinstance(row, ThresholdLogits)
        weights_PK = weights_of(row)
        np.testing.assert_allclose(weights_PK.sum(1), 1.0, atol=1e-5)
        for j, probs_V in enumerate(np.exp(logprobs_PV)):
            head = int(row.num_head_P[j])
            assert len(set(row.token_ids_PK[j].tolist())) == K
            assert probs_V[row.token_ids_PK[j, :head]].tolist() == pytest.approx(
                np.sort(probs_V)[::-1][:head].tolist(), rel=1e-3
            )
            if head < K:
                tau = (1 - np.sort(probs_V)[::-1][:head].sum()) / (K - head)
                assert np.sort(probs_V)[-1 - head] < tau * (1 + 1e-3)
                assert np.ptp(weights_PK[j, head:]) < 1e-6


def test_top_k_keeps_the_largest_and_all_the_rest_in_one_number(
    teacher: Teacher, engine: Engine
) -> None:
    for row, logprobs_PV in zip(teacher.draw(engine, "top_k"), teacher.logprobs_PV, strict=True):
        assert isinstance(row, TopKLogits)
        largest_PK = -np.sort(-logprobs_PV, axis=1)[:, :K]
        np.testing.assert_allclose(row.logprobs_PK, largest_PK, **CLOSE)
        own_PK = np.take_along_axis(logprobs_PV, row.token_ids_PK.astype(np.int64), axis=1)
        np.testing.assert_allclose(own_PK, largest_PK, **CLOSE)
        probs_PK, rest_P = unpack_top_k(row.logprobs_PK, row.rest_logprobs_P)
        np.testing.assert_allclose(rest_P, 1 - np.exp(largest_PK).sum(1), **CLOSE)
        np.testing.assert_allclose(probs_PK.sum(1) + rest_P, 1.0, atol=5e-3)


@pytest.mark.slow
def test_exact_gives_every_logit_back_with_the_head_it_saved(
    teacher: Teacher, tmp_path: Path
) -> None:
    rows = teacher.rows("exact", tmp_path)
    head = LanguageHead.load(tmp_path, device="cpu")
    tensors = load_file(teacher.folder / "model.safetensors")
    matrix_VD = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    assert torch.equal(head.weight_VD, matrix_VD)
    for row, logprobs_PV, hidden_PD in zip(
        rows, teacher.logprobs_PV, teacher.hidden_PD, strict=True
    ):
        assert isinstance(row, ExactLogits)
        np.testing.assert_allclose(row.hidden_PD, hidden_PD, **CLOSE)
        again_PV = head.logits(torch.from_numpy(row.hidden_PD)).log_softmax(-1).numpy()
        np.testing.assert_allclose(again_PV, logprobs_PV, rtol=0, atol=6e-3)


def ids_of(row: AnyLogits) -> npt.NDArray[Any]:
    """The kept token ids of a row, [P, K], or those of its heads end to end."""
    assert not isinstance(row, ExactLogits | RoundedLogits)
    return row.head_ids_H if isinstance(row, TauLogits) else row.token_ids_PK


def test_ids_take_the_width_of_the_vocabulary(
    teacher: Teacher, engine: Engine, tmp_path: Path
) -> None:
    expected = np.uint16 if teacher.vocab_size <= 1 << 16 else np.uint32
    for kind in ("threshold", "threshold_tau", "top_k"):
        bound = stage_of(kind).bind(teacher.context(tmp_path))
        rows = teacher.draw(engine, kind)
        back: list[AnyLogits] = list(bound.table.rows(bound.to_batch(rows)))
        for row, other in zip(rows, back, strict=True):
            assert ids_of(other).dtype == expected
            np.testing.assert_array_equal(ids_of(row), ids_of(other))


def many_draws(
    teacher: Teacher, engine: Engine, length: int
) -> tuple[F64Array, list[ThresholdLogits]]:
    """Return one document's probabilities and 240 rows of it: 12 seeds, 20 names of the row."""
    number = LENGTHS.index(length)
    document, probs_PV = teacher.documents[number], np.exp(teacher.logprobs_PV[number])
    copies = [replace(document, sample_id=f"{name:024x}") for name in range(20)]
    many = replace(teacher, documents=copies)
    rows = [row for seed in range(12) for row in many.draw(engine, "threshold", seed=seed)]
    assert len(rows) == NUM_DRAWS and all(isinstance(row, ThresholdLogits) for row in rows)
    return probs_PV, rows


@pytest.mark.slow
def test_threshold_weights_are_unbiased_over_seeds(teacher: Teacher, engine: Engine) -> None:
    """The mean of S draws of sum_v w_v g_v, for a fixed random g, comes to sum_v p_v g_v.

    Bounds: 4.5 standard errors at the worst position, and over all positions together a mean
    square of the standardised errors of about 1.
    """
    length = 18 if teacher.vocab_size == 512 else 7
    probs_PV, rows = many_draws(teacher, engine, length)
    values_V = np.random.default_rng(5).standard_normal(teacher.vocab_size)
    draws_SP = np.array([(weights_of(row) * values_V[row.token_ids_PK]).sum(1) for row in rows])
    assert draws_SP.std(0).min() > 0  # every seed and row draws anew at every position
    standard_error_P = draws_SP.std(0, ddof=1) / np.sqrt(NUM_DRAWS)
    standardised_P = (draws_SP.mean(0) - probs_PV @ values_V) / standard_error_P
    assert np.abs(standardised_P).max() < 4.5
    assert (standardised_P**2).mean() < 3.0


@pytest.mark.parametrize("teacher", ["tiny_model"], indirect=True)
def test_each_tokens_mean_weight_is_its_probability(teacher: Teacher, engine: Engine) -> None:
    """Token by token: errors as large as the variance p tau - p^2 has them, and no larger."""
    probs_PV, rows = many_draws(teacher, engine, 18)
    means_PV = np.zeros_like(probs_PV)
    for row in rows:
        for weights_V, ids_K, weights_K in zip(
            means_PV, row.token_ids_PK, weights_of(row), strict=True
        ):
            weights_V[ids_K] += weights_K / NUM_DRAWS
    falling_PV = -np.sort(-probs_PV, axis=1)
    for probs_V, falling_V, mean_V, head in zip(
        probs_PV, falling_PV, means_PV, rows[0].num_head_P.tolist(), strict=True
    ):
        if head == K:
            continue
        tau = falling_V[head:].sum() / (K - head)
        tail_V = probs_V < tau * 0.98
        variance_V = probs_V[tail_V] * (tau - probs_V[tail_V]) / NUM_DRAWS
        errors_V = (mean_V[tail_V] - probs_V[tail_V]) / np.sqrt(variance_V)
        assert 0.6 < (errors_V**2).mean() < 1.5
        assert abs(errors_V.mean()) < 0.3


def test_seeds_move_draws_and_nothing_else(teacher: Teacher, engine: Engine) -> None:
    one, again, other = (teacher.draw(engine, "threshold", seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(one, again, other, strict=True):
        np.testing.assert_array_equal(a.token_ids_PK, b.token_ids_PK)
        np.testing.assert_array_equal(a.head_codes_E, b.head_codes_E)
        assert (a.token_ids_PK != c.token_ids_PK).any()
        np.testing.assert_array_equal(a.num_head_P, c.num_head_P)
        np.testing.assert_array_equal(a.entropies_P, c.entropies_P)


def test_blocks_of_positions_change_no_draw(
    teacher: Teacher, engine: Engine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of 7 positions instead of all: the same draws, and values to the last few bits."""
    whole = teacher.draw(engine, kind)
    monkeypatch.setattr(logits, "MAX_BLOCK_BYTES", 7 * 4 * teacher.vocab_size)
    for row, other in zip(whole, teacher.draw(engine, kind), strict=True):
        np.testing.assert_allclose(row.next_token_logprobs_P, other.next_token_logprobs_P, **COARSE)
        if isinstance(row, RoundedLogits):
            # A trial whose KL is on the edge of what is allowed may fall either way, too.
            assert row.hidden_step == pytest.approx(other.hidden_step, rel=0.02)
            codes_PD = other.hidden_codes_PD * (other.hidden_step / row.hidden_step)
            assert np.isclose(row.hidden_codes_PD, codes_PD, atol=2.0).mean() > 0.99
        elif not isinstance(row, ExactLogits):
            kept = (
                sampled_of(each)[0] if isinstance(each, TauLogits) else ids_of(each)
                for each in (row, other)
            )
            same = np.equal(*kept).mean()
            assert same > 0.99  # a draw on the edge between two tokens may fall either way
