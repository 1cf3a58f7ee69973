"""Advantages drawn with one threshold of the table, and their bytes, against float64 definitions.

Dimensions: P = positions, V = vocabulary, K = the most tokens of a position, R = repetitions.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError

from schemas.advantage_values import LEVEL_SIZES, advantage_values, value_codes, values_of
from schemas.distribution import split_gaps, uniforms
from stages.signals.advantages.drawing import DrawnKept, drawn_support
from stages.signals.advantages.stage import ThresholdSupport
from stages.signals.advantages.supports import Scored, StudentTop

F64Array = npt.NDArray[np.float64]
TAU, BETA = 0.02, 0.5


def softmax(logits: F64Array) -> F64Array:
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True))


def three_models(kind: str) -> tuple[F64Array, F64Array, F64Array]:
    """Aligned teacher, reference and student [V] of one position."""
    rng = np.random.default_rng(5)
    vocab_size = {"wide": 49_152, "wider": 151_936, "prime": 307}.get(kind, 320)
    base_V = rng.normal(size=vocab_size) * 3.0
    if kind == "one-hot":
        base_V = np.where(np.arange(vocab_size) == 7, 40.0, -base_V)
    if kind == "flat":
        base_V = np.zeros(vocab_size)
    moved = [base_V + rng.normal(size=vocab_size) * by for by in (0.3, 0.0, 0.8)]
    aligned_V, reference_V, student_V = (softmax(logits_V) for logits_V in moved)
    return aligned_V, reference_V, student_V


def drawn(
    models: tuple[F64Array, F64Array, F64Array], offsets_P: Any, *, tau: float, max_k: int
) -> DrawnKept:
    """Draw one position once for each offset."""
    aligned_PV, reference_PV, student_PV = (
        torch.from_numpy(probs_V).expand(len(offsets_P), -1) for probs_V in models
    )
    scored = Scored(
        aligned_PV.log().float(),
        reference_PV.log().float(),
        torch.zeros(len(offsets_P), dtype=torch.long),
        BETA,
    )
    top = student_PV.float().topk(6, dim=1)
    return drawn_support(
        scored, StudentTop(top.indices, top.values.log()), offsets_P, tau=tau, max_k=max_k
    )


def defined(
    models: tuple[F64Array, F64Array, F64Array], rest: float, tau: float
) -> tuple[F64Array, F64Array]:
    """Return d [V] and the probability that each token is kept [V], where ``max_k`` is enough."""
    aligned_V, reference_V, student_V = models
    known = np.argsort(-student_V)[:6]
    guess_V = np.sqrt(aligned_V + reference_V)
    guess_V[known] = 0.0
    guess_V *= max(0.0, 1.0 - student_V[known].sum()) / guess_V.sum()
    guess_V[known] = student_V[known]
    mean_V = (aligned_V + reference_V + guess_V) / 3
    differences_V = BETA * (np.log(aligned_V) - np.log(reference_V)) - rest
    least_V = 2.0 ** np.ceil(np.log2(tau * BETA / mean_V))
    return differences_V, np.minimum(1.0, np.abs(differences_V) / least_V)


@pytest.mark.parametrize("kind", ["random", "prime", "one-hot", "flat"])
def test_tokens_are_kept_as_often_as_defined_with_the_value_that_makes_it_even(kind: str) -> None:
    """All offsets in turn, 2,000 of them: no chance is left but where two of them meet."""
    models, num_draws = three_models(kind), 2000
    offsets_P = (torch.arange(num_draws) + 0.5) / num_draws
    kept = drawn(models, offsets_P, tau=TAU, max_k=64)
    differences_V, chances_V = defined(models, float(kept.rest_advantages_P[0]), TAU)
    ids = kept.token_ids_PK[kept.is_kept_PK].numpy()
    values = kept.values_PK[kept.is_kept_PK].double().numpy()
    often_V = np.bincount(ids, minlength=len(chances_V)) / num_draws
    np.testing.assert_allclose(often_V, chances_V, atol=1.5 / num_draws)
    if kind in ("random", "prime"):
        assert 0 < (chances_V == 1).sum() < chances_V.sum() - 1
    np.testing.assert_allclose(values, (differences_V / chances_V)[ids], rtol=1e-4, atol=1e-7)
    octaves = np.log2(np.abs(values[chances_V[ids] < 1]))
    np.testing.assert_allclose(octaves, np.round(octaves), atol=1e-6)
    counts = kept.is_kept_PK.sum(1)
    assert set(counts.tolist()) <= {int(chances_V.sum()), int(chances_V.sum()) + 1}
    for ids_K, count in zip(kept.token_ids_PK.tolist(), counts.tolist(), strict=True):
        assert ids_K[:count] == sorted(set(ids_K[:count]))


@pytest.mark.parametrize(("kind", "num_draws"), [("random", 4000), ("wide", 96), ("wider", 32)])
def test_the_mean_over_draws_is_the_sum_over_the_vocabulary(kind: str, num_draws: int) -> None:
    models, sums = three_models(kind), []
    draws_PN = uniforms(3, num_draws, 65)
    for start in range(0, num_draws, 64):
        part_PN = draws_PN[start : start + 64]
        offsets_P = torch.from_numpy(part_PN[:, 0].copy())
        ids_PK, values_PK, rest_P = advantage_values(columns_of(models, offsets_P, part_PN[:, 1:]))
        sums.append((models[2][ids_PK] * values_PK).sum(1) + rest_P)
    found_P = np.concatenate(sums)
    full = BETA * float(models[2] @ (np.log(models[0]) - np.log(models[1])))
    standard_error = found_P.std() / num_draws**0.5
    assert standard_error > 0
    assert abs(found_P.mean() - full) < 4 * standard_error + 1e-6


def test_a_student_that_went_where_no_model_was_meets_the_advantage_there() -> None:
    """The peak is on a token of next to no mass, so it is seldom drawn; half the student is there.

    The larger value of the few draws makes up for all that missed it.
    """
    aligned_V, reference_V, student_V = three_models("random")
    peak = int(reference_V.argmin())
    raised_V = np.where(np.arange(len(aligned_V)) == peak, reference_V * np.exp(3.0), aligned_V)
    models = raised_V / raised_V.sum(), reference_V, student_V
    later_V = 0.5 * student_V + 0.5 * np.eye(len(student_V))[peak]
    draws_PN = uniforms(4, 4_000, 65)
    offsets_P = torch.from_numpy(draws_PN[:, 0].copy())
    ids_PK, values_PK, rest_P = advantage_values(columns_of(models, offsets_P, draws_PN[:, 1:]))
    assert 0 < ((ids_PK == peak) & (values_PK != 0)).any(axis=1).mean() < 0.1
    found_P = (later_V[ids_PK] * values_PK).sum(1) + rest_P
    full = BETA * float(later_V @ (np.log(models[0]) - np.log(reference_V)))
    assert abs(found_P.mean() - full) < 4 * found_P.std() / len(found_P) ** 0.5 + 1e-6
    assert full > 0.5 * BETA * 2.5


def columns_of(
    models: tuple[F64Array, F64Array, F64Array], offsets_P: Any, uniforms_PK: Any
) -> dict[str, Any]:
    """Return what a row would keep of one position drawn again and again."""
    kept = drawn(models, offsets_P, tau=TAU, max_k=64)
    is_kept_PK = kept.is_kept_PK.numpy()
    low_E, high_E = split_gaps(kept.token_ids_PK.numpy(), is_kept_PK)
    return {
        "num_entries_P": is_kept_PK.sum(1),
        "id_gaps_low_E": low_E,
        "id_gaps_high_E": high_E,
        "value_codes_E": value_codes(kept.values_PK.numpy()[is_kept_PK], uniforms_PK[is_kept_PK]),
        "rest_advantages_P": kept.rest_advantages_P.numpy().astype(np.float16),
    }


def test_no_position_has_more_than_max_k_and_it_stays_unbiased() -> None:
    models = three_models("flat")
    offsets_P = (torch.arange(4000) + 0.5) / 4000
    free, bound = (drawn(models, offsets_P, tau=0.002, max_k=k) for k in (255, 9))
    assert int(free.is_kept_PK.sum(1).min()) > 9
    counts_P = bound.is_kept_PK.sum(1)
    assert int(counts_P.max()) <= 9 and int(counts_P.min()) >= 4  # tau is doubled, not more
    differences_V, _ = defined(models, float(bound.rest_advantages_P[0]), 0.002)
    dense_V = np.zeros(len(differences_V))
    is_kept_PK = bound.is_kept_PK.numpy()
    np.add.at(
        dense_V, bound.token_ids_PK.numpy()[is_kept_PK], bound.values_PK.numpy()[is_kept_PK] / 4000
    )
    largest = float(bound.values_PK.abs().max())
    np.testing.assert_allclose(dense_V, differences_V, atol=1.5 * largest / 4000)


def test_a_draw_does_not_depend_on_the_positions_beside_it() -> None:
    models = [three_models(kind) for kind in ("random", "one-hot", "flat")]
    offsets_P = torch.tensor([0.1, 0.5, 0.9])
    alone = [drawn(each, offsets_P[i : i + 1], tau=TAU, max_k=12) for i, each in enumerate(models)]
    stacked = [torch.from_numpy(np.stack(part)) for part in zip(*models, strict=True)]
    scored = Scored(
        stacked[0].log().float(), stacked[1].log().float(), torch.zeros(3, dtype=torch.long), BETA
    )
    top = stacked[2].float().topk(6, dim=1)
    student = StudentTop(top.indices, top.values.log())
    together = drawn_support(scored, student, offsets_P, tau=TAU, max_k=12)
    for p, one in enumerate(alone):
        for name in ("token_ids_PK", "values_PK", "is_kept_PK"):
            assert torch.equal(getattr(together, name)[p], getattr(one, name)[0]), name


def test_models_that_agree_keep_no_token() -> None:
    aligned_V, _, student_V = three_models("random")
    kept = drawn((aligned_V, aligned_V, student_V), torch.rand(50), tau=1e-6, max_k=255)
    assert not kept.is_kept_PK.any() and not kept.rest_advantages_P.any()


def test_values_are_rounded_without_bias_to_the_levels_beside_them() -> None:
    rng = np.random.default_rng(1)
    sizes = np.concatenate([LEVEL_SIZES, [0.3, 0.0123, 7.7, LEVEL_SIZES[126] * 1.01]])
    signs = rng.choice([-1.0, 1.0], len(sizes))
    repeats = 2000
    draws_R = (np.arange(repeats) + 0.5) / repeats
    found_R = np.stack([values_of(value_codes(sizes * signs, np.full(len(sizes), u)))
                        for u in draws_R]).astype(np.float64)  # fmt: skip
    np.testing.assert_allclose(found_R.mean(0), sizes * signs, rtol=2e-4)
    on_levels = np.unique(np.abs(found_R[:, :128]), axis=0)
    assert len(on_levels) == 1  # a level is itself, whatever is drawn
    spread = np.abs(found_R[:, 128:]).max(0) / np.abs(found_R[:, 128:]).min(0)
    np.testing.assert_allclose(spread, 2 ** (1 / 3), rtol=1e-6)
    assert LEVEL_SIZES[0] == 2.0**-18 and LEVEL_SIZES[126] == 2.0**24
    for size in (LEVEL_SIZES[0] / 2, LEVEL_SIZES[-1] * 2, np.nan):
        with pytest.raises(ValueError, match="have no level"):
            value_codes(np.array([size]), np.zeros(1))


def test_a_hand_worked_row() -> None:
    row = {
        "num_entries_P": np.array([2, 0, 1], np.uint8),
        "id_gaps_low_E": np.array([4, 8, 255], np.uint8),  # ids 4, then 4 + 8 + 2 * 256, and 511
        "id_gaps_high_E": np.array([0, 2, 1], np.uint8),
        "value_codes_E": np.array([2 * 54, 2 * 57 + 1, 2 * 55], np.uint8),
        "rest_advantages_P": np.array([0.5, -0.25, 0.0], np.float16),
    }
    ids_PK, values_PK, rest_P = advantage_values(row)
    assert ids_PK.tolist() == [[4, 524], [0, 0], [511, 0]]
    expected_PK = np.array([[1, -2], [0, 0], [2 ** (1 / 3), 0]])
    np.testing.assert_allclose(values_PK, expected_PK, rtol=1e-6)
    assert rest_P.tolist() == [0.5, -0.25, 0.0]
    with pytest.raises(ValueError, match="support exact"):
        advantage_values({"teacher_hidden_PD": np.zeros((1, 2))})


def test_settings_name_one_rule() -> None:
    assert ThresholdSupport().model_dump() == {"kind": "threshold", "tau": 0.002, "max_k": 64}
    assert ThresholdSupport(k=16).model_dump() == {"kind": "threshold", "k": 16}
    for wrong, said in (
        ({"k": 16, "tau": 0.1}, "k is 16 beside tau or max_k"),
        ({"k": 16, "max_k": 20}, "k is 16 beside tau or max_k"),
        ({"tau": None}, "leave them out for their defaults"),
        ({"tau": 0.0}, "greater than 0"),
        ({"max_k": 256}, "less than or equal to 255"),
    ):
        with pytest.raises(ValidationError, match=said):
            ThresholdSupport.model_validate(wrong)
