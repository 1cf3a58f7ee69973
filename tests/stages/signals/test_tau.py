"""Encoding ``threshold`` with ``tau``: numbers of entries, weights and draws, against definitions.

Dimensions: P = positions, V = vocabulary, K = the most entries of a position, R = repetitions.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from schemas.distribution import (
    STICK_LEVELS,
    quantise_sticks,
    split_gaps,
    uniforms,
    weighted_tokens,
)
from schemas.errors import StoreError
from stages.signals.scoring.encoding import ThresholdSample, measure, threshold_sample
from stages.signals.scoring.states import Asked
from stages.signals.teacher_logits.encoder import RowEncoder, with_weight
from stages.signals.teacher_logits.stage import TeacherLogitsStage, ThresholdEncoding
from stages.stage import StageContext
from tests.fixtures.tiny_teacher import sampled_of

Array = npt.NDArray[Any]
ONE_HOT = torch.full((3, 700), -torch.inf).index_fill_(1, torch.tensor([5]), 0.0)


def mixed_logits(vocab_size: int = 3_000, num_positions: int = 24) -> Tensor:
    """Positions from nearly sure to nearly flat."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits_PV = torch.randn(num_positions, vocab_size, generator=generator)
    return logits_PV * torch.linspace(0.2, 9.0, num_positions)[:, None]


def sample_of(logits_PV: Tensor, *, k: int, tau: float | None, key: int = 0) -> ThresholdSample:
    num_positions = len(logits_PV)
    measured = measure(logits_PV.clone(), torch.zeros(num_positions, dtype=torch.int64))
    offsets_P = torch.from_numpy(uniforms(key, num_positions, 1)[:, 0].copy())
    return threshold_sample(measured, offsets_P, k=k, tau=tau)


def row_of(logits_PV: Tensor, key: str = "a" * 24, part: int = 1000, **encoding: Any) -> Any:
    """Encode positions as the stage does, ``part`` at a time."""
    settings = {"kind": "threshold", **encoding}
    body = {"stage": "teacher_logits", "input": "-", "model": "-", "encoding": settings}
    targets_P = torch.zeros(len(logits_PV), dtype=torch.int64)
    encoder = RowEncoder(
        TeacherLogitsStage.model_validate(body),
        Asked(key, 1, targets_P.numpy()),
        logits_PV.shape[1],
    )
    for start in range(0, len(logits_PV), part):
        at = slice(start, start + part)
        encoder.add(measure(logits_PV[at].clone(), targets_P[at]), torch.zeros(0), start)
    return encoder.row()


def counts_of(row: Any) -> list[int]:
    return (row.num_head_P.astype(int) + row.num_tail_P).tolist()  # type: ignore[no-any-return]


def own_threshold(probs_V: Array, k: int) -> float:
    """Solve sum(min(1, p / tau)) = k by bisection in float64."""
    low, high = 0.0, 1.0
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if np.minimum(1.0, probs_V / tau).sum() > k else (low, tau)
    return high


@pytest.mark.parametrize("tau", [0.3, 0.1, 0.04, 0.013])
def test_a_position_has_the_fewest_entries_whose_threshold_is_at_most_tau(tau: float) -> None:
    logits_PV = mixed_logits()
    sample = sample_of(logits_PV, k=80, tau=tau)
    counts = sample.num_entries_P.tolist()
    assert len(set(counts)) > 2 and max(counts) <= np.ceil(1 / tau)
    probs_PV = logits_PV.double().softmax(-1).numpy()
    for probs_V, k, num_head in zip(probs_PV, counts, sample.num_head_P.tolist(), strict=True):
        assert own_threshold(probs_V, k) <= tau * (1 + 1e-5)
        assert k == 1 or own_threshold(probs_V, k - 1) > tau * (1 - 1e-5)
        if num_head < k:  # all of at least the position's own threshold, and no other
            assert num_head == (probs_V >= own_threshold(probs_V, k)).sum()


@pytest.mark.parametrize("encoding", [{}, {"tau": 0.02}, {"tau": 0.01, "max_k": 30}])
def test_entries_are_distinct_their_weights_sum_to_one_and_max_k_holds(
    encoding: dict[str, Any],
) -> None:
    logits_PV = mixed_logits()
    row = row_of(logits_PV, **encoding)
    ids_PK, weights_PK = sampled_of(row)
    np.testing.assert_allclose(weights_PK.sum(axis=1), 1.0, atol=2e-6)
    counts = counts_of(row)
    assert max(counts) == {0: 25, 1: 50, 2: 30}[len(encoding)]
    for ids_K, weights_K, count in zip(ids_PK, weights_PK, counts, strict=True):
        assert len(set(ids_K[:count].tolist())) == count
        assert (weights_K[:count] > 0).all()  # none that says nothing is kept
        assert (weights_K[count:] == 0).all() and (ids_K[count:] == ids_K[0]).all()


def test_where_max_k_binds_the_draw_is_that_of_k() -> None:
    logits_PV = mixed_logits()[:6]  # the flat ones
    bound, fixed = (sample_of(logits_PV, k=9, tau=tau) for tau in (0.01, None))
    assert (bound.num_entries_P == 9).all()
    torch.testing.assert_close(bound.token_ids_PK, fixed.token_ids_PK)
    torch.testing.assert_close(bound.num_head_P, fixed.num_head_P)


def test_edges_sure_flat_and_small_vocabularies() -> None:
    sure = row_of(ONE_HOT)
    assert counts_of(sure) == [1, 1, 1] and sure.head_ids_H.tolist() == [5, 5, 5]
    assert sampled_of(sure)[1].tolist() == [[1.0]] * 3
    flat = row_of(torch.zeros(2, 700), tau=0.05)
    assert counts_of(flat) == [20, 20] and flat.num_head_P.tolist() == [0, 0]
    assert counts_of(row_of(torch.zeros(2, 700), tau=0.05, max_k=7)) == [7, 7]
    np.testing.assert_allclose(sampled_of(flat)[1], 1 / 20, rtol=1e-6)
    few = torch.tensor([[0.0, -1.0, -0.5, 0.3, -0.2]])  # fewer tokens than max_k
    ids_PK, weights_PK = sampled_of(row_of(few, tau=0.01))
    assert sorted(ids_PK[0].tolist()) == [0, 1, 2, 3, 4]
    assert weights_PK.sum() == pytest.approx(1.0, abs=1e-6)
    assert counts_of(row_of(few, tau=1.0)) == [1]


def test_each_tokens_mean_weight_is_its_probability() -> None:
    """4,000 rows of one position: errors as large as the draws' own variance has them."""
    repeats = 4_000
    logits_V = torch.randn(60, generator=torch.Generator().manual_seed(3)) * 2.5
    probs_V = logits_V.double().softmax(-1).numpy()
    row = row_of(logits_V.expand(repeats, -1), tau=0.12)
    ids_PK, weights_PK = sampled_of(row)
    dense_RV = np.zeros((repeats, 60))
    np.add.at(dense_RV, (np.arange(repeats)[:, None], ids_PK), weights_PK)
    often_V = repeats * probs_V / 0.12 > 20  # others are drawn too seldom to tell a variance
    standard_error_V = dense_RV.std(0, ddof=1) / np.sqrt(repeats)
    errors_V = (dense_RV.mean(0) - probs_V)[often_V] / standard_error_V[often_V]
    assert often_V.sum() > 15 and (dense_RV.mean(0) - probs_V)[~often_V].max() < 1e-3
    assert np.abs(errors_V).max() < 4.0
    assert 0.3 < (errors_V**2).mean() < 2.0


def test_entries_of_weight_zero_are_left_out_and_nothing_else_changes() -> None:
    logits_PV = mixed_logits(num_positions=200)
    sample = sample_of(logits_PV, k=25, tau=0.04)
    codes_PK = quantise_sticks(sample.fractions_PK.numpy(), uniforms(1, 200, 25))
    counts = sample.num_entries_P.numpy(), sample.num_head_P.numpy()
    given_PK, dense = sample.token_ids_PK.numpy(), []
    for entries_P, head_P in (counts, with_weight(*counts, codes_PK)):
        in_head_PK, in_use_PK = (np.arange(25) < each[:, None] for each in (head_P, entries_P))
        low_E, high_E = split_gaps(given_PK, in_use_PK & ~in_head_PK)
        packed = {
            "num_head_P": head_P,
            "num_tail_P": entries_P - head_P,
            "head_ids_H": given_PK[in_head_PK],
            "head_codes_H": codes_PK[in_head_PK],
            "tail_gaps_low_E": low_E,
            "tail_gaps_high_E": high_E,
        }
        ids_PK, weights_PK = weighted_tokens(packed)
        kept_PK = np.arange(ids_PK.shape[1]) < entries_P[:, None]
        np.testing.assert_array_equal(ids_PK[kept_PK], given_PK[in_use_PK])
        dense_PV = np.zeros(logits_PV.shape)
        np.add.at(dense_PV, (np.arange(200)[:, None], ids_PK), weights_PK)
        dense.append(dense_PV)
    np.testing.assert_array_equal(dense[0], dense[1])
    assert counts[0].sum() > with_weight(*counts, codes_PK)[0].sum()


def test_weights_are_those_of_a_hand_worked_row() -> None:
    """Position 0: sticks 0.5 and 0.5 of the rest, two tail entries share a quarter; 1: sure."""
    half = int(np.argmin(np.abs(STICK_LEVELS - 0.5)))
    level = STICK_LEVELS[half]
    row = {
        "num_head_P": np.array([2, 1, 0], np.uint8),
        "num_tail_P": np.array([2, 0, 1], np.uint8),
        "head_ids_H": np.array([9, 3, 7], np.uint16),
        "head_codes_H": np.array([half, half, 63], np.uint8),
        "tail_gaps_low_E": np.array([4, 8, 255], np.uint8),  # ids 4, then 4 + 8 + 2 * 256, and 511
        "tail_gaps_high_E": np.array([0, 2, 1], np.uint8),
    }
    ids_PK, weights_PK = weighted_tokens(row)
    assert ids_PK.tolist() == [[9, 3, 4, 524], [7] * 4, [511] * 4]
    tail = (1 - level) ** 2 / 2
    expected = [[level, (1 - level) * level, tail, tail], [1, 0, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(weights_PK, expected, atol=1e-6)
    with pytest.raises(ValueError, match="2 head codes for 3 head entries"):
        weighted_tokens(row | {"head_codes_H": np.array([1, 2])})
    with pytest.raises(ValueError, match="rise"):
        split_gaps(np.array([[5, 4]]), np.ones((1, 2), bool))


def test_a_rows_bytes_depend_on_its_key_alone() -> None:
    """Blocks of other sizes and another run draw the same; another row or seed draws anew."""
    logits_PV = mixed_logits()
    whole, again, other = row_of(logits_PV), row_of(logits_PV, part=5), row_of(logits_PV, "b" * 24)
    for name in whole.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(whole, name), getattr(again, name))
    assert whole.tail_gaps_low_E.tolist() != other.tail_gaps_low_E.tolist()


def test_settings_name_one_rule_and_tables_of_k_keep_their_fingerprints() -> None:
    assert ThresholdEncoding().model_dump() == {"kind": "threshold", "tau": 0.04, "max_k": 64}
    assert ThresholdEncoding(k=16).model_dump() == {"kind": "threshold", "k": 16}
    assert ThresholdEncoding(tau=0.1).max_k == 64
    for wrong, said in (
        ({"k": 16, "tau": 0.1}, "k is 16 beside tau, mean_k or max_k"),
        ({"k": 16, "max_k": 20}, "k is 16 beside tau, mean_k or max_k"),
        ({"tau": None}, "leave them out for their defaults"),
        ({"tau": 0.0}, "greater than 0"),
        ({"tau": 1.5}, "less than or equal to 1"),
        ({"max_k": 256}, "less than or equal to 255"),
    ):
        with pytest.raises(ValidationError, match=said):
            ThresholdEncoding.model_validate(wrong)


def test_without_the_coder_of_the_packed_layout_no_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = {"kind": "threshold", "layout": "packed"}
    body = {"stage": "teacher_logits", "input": "-", "model": "-", "encoding": encoding}
    stage = TeacherLogitsStage.model_validate(body)
    monkeypatch.setitem(sys.modules, "constriction", None)
    context = StageContext(tmp_path, 100)  # names no model: none is looked for
    with pytest.raises(StoreError, match="coder is not installed"), stage.open(context):
        raise AssertionError("opened")
