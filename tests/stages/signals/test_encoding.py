"""Encodings against the definition: exact counts, unit sums, no bias, and known lower bounds.

Dimensions: P = positions, V = vocabulary, K = kept entries, R = repetitions.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from schemas.distribution import (
    STICK_LEVELS,
    expectation,
    quantise_sticks,
    uniforms,
    unpack_threshold,
    unpack_top_k,
)
from stages.signals.scoring.encoding import measure, threshold_sample, top_k

VOCABULARIES = (49_152, 131_072, 151_936, 262_144)
Array = npt.NDArray[Any]


def peaked_logits(num_positions: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Logits with the long tail and the few large values of a language model."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, vocab_size + 1).float()
    logits_PV = -1.2 * ranks.log() + torch.randn(num_positions, vocab_size, generator=generator)
    order_PV = torch.rand(num_positions, vocab_size, generator=generator).argsort(dim=1)
    return logits_PV.gather(1, order_PV)


def encode(logits_PV: Tensor, k: int, key: int = 0) -> tuple[Array, Array, Array]:
    """Return token ids [P, K], decoded weights [P, K] and head counts [P]."""
    num_positions = len(logits_PV)
    uniforms_PN = uniforms(key, num_positions, k + 1)
    measured = measure(logits_PV.clone(), torch.zeros(num_positions, dtype=torch.int64))
    sample = threshold_sample(measured, torch.from_numpy(uniforms_PN[:, 0].copy()), k=k)
    num_head_P = sample.num_head_P.numpy().astype(np.uint8)
    codes_PK = quantise_sticks(sample.fractions_PK.numpy(), uniforms_PN[:, 1:])
    in_head_PK = np.arange(k) < num_head_P[:, None]
    weights_PK = unpack_threshold(sample.token_ids_PK.numpy(), num_head_P, codes_PK[in_head_PK])
    return sample.token_ids_PK.numpy(), weights_PK, num_head_P


def reference_head(probs_V: Array, k: int) -> tuple[float, Array]:
    """Solve sum(min(1, p / tau)) = k by bisection in float64; return tau and the head's ids."""
    low, high = 0.0, 1.0
    for _ in range(200):
        tau = (low + high) / 2
        if np.minimum(1.0, probs_V / tau).sum() > k:
            low = tau
        else:
            high = tau
    return high, np.flatnonzero(probs_V >= high)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_exactly_k_distinct_entries_whose_weights_sum_to_one(vocab_size: int) -> None:
    ids_PK, weights_PK, _ = encode(peaked_logits(6, vocab_size), k=16)
    assert ids_PK.shape == weights_PK.shape == (6, 16)
    assert all(len(set(ids_K)) == 16 for ids_K in ids_PK.tolist())
    assert ids_PK.max() < vocab_size
    assert ids_PK.max() > vocab_size // 4  # the upper ids are reached, not wrapped
    np.testing.assert_allclose(weights_PK.sum(axis=1), 1.0, atol=2e-6)
    assert (weights_PK >= 0).all()


@pytest.mark.parametrize("k", [2, 8, 16, 64])
def test_head_and_threshold_are_those_of_the_definition(k: int) -> None:
    logits_PV = peaked_logits(20, 5_000, seed=k)
    ids_PK, weights_PK, num_head_P = encode(logits_PV, k)
    for p, probs_V in enumerate(torch.softmax(logits_PV.double(), -1).numpy()):
        tau, head = reference_head(probs_V, k)
        assert set(ids_PK[p, : num_head_P[p]].tolist()) == set(head.tolist())
        if num_head_P[p] < k:
            spread = 2 * float(STICK_LEVELS[32] - STICK_LEVELS[31]) / (k - num_head_P[p])
            assert weights_PK[p, -1] == pytest.approx(tau, abs=spread * (num_head_P[p] + 1))


def test_the_mean_over_draws_is_the_distribution_at_the_rate_of_an_unbiased_estimate() -> None:
    """z-scores of R draws: unbiased means |mean - p| stays within a few standard errors."""
    probs_V = torch.softmax(peaked_logits(1, 60, seed=3).double(), -1).numpy()[0]
    logits_V = torch.from_numpy(np.log(probs_V)).float()
    k, repeats = 8, 40_000
    ids_RK, weights_RK, _ = encode(logits_V.repeat(repeats, 1), k, key=11)
    dense_RV = np.zeros((repeats, 60))
    np.put_along_axis(dense_RV, ids_RK.astype(np.int64), weights_RK, axis=1)
    mean_V, error_V = dense_RV.mean(axis=0), dense_RV.std(axis=0) / np.sqrt(repeats)
    z_V = (mean_V - probs_V) / np.maximum(error_V, 1e-9)
    assert np.abs(z_V).max() < 4.5
    assert 0.5 < np.sqrt((z_V**2).mean()) < 1.6
    quarter = dense_RV[: repeats // 4].mean(axis=0)
    far, near = np.abs(quarter - probs_V).mean(), np.abs(mean_V - probs_V).mean()
    assert near < 0.8 * far  # the error falls like one over the root of the draws


def test_threshold_varies_less_than_sampling_with_replacement_at_equal_entries() -> None:
    """Equal entries: as many draws as give RS-KD sixteen distinct ids on average."""
    logits_PV = peaked_logits(40, 8_192, seed=5)
    probs_PV = torch.softmax(logits_PV, -1)
    values_PV = torch.log_softmax(
        logits_PV + torch.randn(logits_PV.shape, generator=torch.Generator().manual_seed(1)), -1
    ).numpy()
    exact_P = (probs_PV.numpy() * values_PV).sum(axis=1)
    draws = next(n for n in range(16, 400) if _distinct(probs_PV, n) >= 16)
    ours, theirs = [], []
    for key in range(60):
        ids_PK, weights_PK, _ = encode(logits_PV, 16, key=key)
        ours.append(expectation(ids_PK, weights_PK, values_PV) - exact_P)
        generator = torch.Generator().manual_seed(key)
        drawn = torch.multinomial(probs_PV, draws, replacement=True, generator=generator).numpy()
        theirs.append(np.take_along_axis(values_PV, drawn, axis=1).mean(axis=1) - exact_P)
    assert np.square(ours).mean() < 0.6 * np.square(theirs).mean()


def _distinct(probs_PV: Tensor, num_draws: int) -> float:
    return float((1 - (1 - probs_PV) ** num_draws).sum(dim=1).mean())


@pytest.mark.parametrize("vocab_size", [64, 49_152])
def test_uniform_distribution_is_all_tail(vocab_size: int) -> None:
    ids_PK, weights_PK, num_head_P = encode(torch.zeros(5, vocab_size), k=16)
    assert (num_head_P == 0).all()
    np.testing.assert_allclose(weights_PK, 1 / 16, rtol=1e-6)
    assert all(len(set(ids_K)) == 16 for ids_K in ids_PK.tolist())


def test_one_hot_keeps_all_its_mass_on_the_one_token() -> None:
    logits_PV = torch.full((4, 1000), float("-inf"))
    logits_PV[:, 123] = 3.0
    ids_PK, weights_PK, _ = encode(logits_PV, k=16)
    assert (ids_PK[:, 0] == 123).all()
    np.testing.assert_array_equal(weights_PK[:, 0], 1.0)
    np.testing.assert_array_equal(weights_PK[:, 1:], 0.0)


def test_minus_infinity_is_never_drawn() -> None:
    logits_PV = peaked_logits(50, 2_000)
    banned = torch.arange(0, 2_000, 2)
    logits_PV[:, banned] = float("-inf")
    ids_PK, weights_PK, _ = encode(logits_PV, k=32)
    assert not ((ids_PK % 2 == 0) & (weights_PK > 0)).any()


def test_a_support_smaller_than_k_is_kept_whole() -> None:
    logits_PV = torch.full((3, 500), float("-inf"))
    logits_PV[:, [7, 8, 9]] = torch.log(torch.tensor([0.5, 0.25, 0.25]))
    ids_PK, weights_PK, _ = encode(logits_PV, k=16)
    assert set(ids_PK[0, :3].tolist()) == {7, 8, 9}
    np.testing.assert_allclose(weights_PK[:, :3].sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(weights_PK[:, 3:], 0.0)


def test_ties_share_the_draws_evenly() -> None:
    logits_V = torch.zeros(32)
    ids_RK, _, num_head_R = encode(logits_V.repeat(20_000, 1), k=8, key=4)
    assert (num_head_R == 0).all()
    counts_V = np.bincount(ids_RK.ravel(), minlength=32)
    np.testing.assert_allclose(counts_V / 20_000, 8 / 32, atol=0.02)


def test_a_nearly_certain_token_keeps_its_true_remainder() -> None:
    """1 - p would lose a remainder of 1e-9 in float32; the mean weight of the tail must not."""
    logits_PV = torch.full((4_000, 100), -25.0)
    logits_PV[:, 0] = 0.0
    remainder = 99 * np.exp(-25.0)
    ids_PK, weights_PK, _ = encode(logits_PV, k=4, key=9)
    assert (ids_PK[:, 0] == 0).all()
    tail_P = weights_PK[:, 1:].sum(axis=1)
    standard_error = tail_P.std() / np.sqrt(len(tail_P))
    assert abs(tail_P.mean() - remainder) < 5 * max(standard_error, remainder)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 24), st.floats(0.1, 12.0))
def test_any_distribution_keeps_the_invariants(seed: int, k: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_PV = torch.randn(8, 97, generator=generator) * scale
    ids_PK, weights_PK, num_head_P = encode(logits_PV, k, key=seed)
    np.testing.assert_allclose(weights_PK.sum(axis=1), 1.0, atol=4e-6)
    assert all(len(set(ids_K)) == k for ids_K in ids_PK.tolist())
    assert (num_head_P <= k).all()


def test_rounding_of_sticks_is_unbiased_and_within_one_level() -> None:
    fractions = np.repeat(np.linspace(0, 1, 101), 4_000)[:, None]
    codes = quantise_sticks(fractions, uniforms(5, len(fractions), 1))
    values = STICK_LEVELS[codes]
    assert np.abs(values - fractions).max() <= np.diff(STICK_LEVELS).max() + 1e-12
    bias = (values - fractions).reshape(101, 4_000).mean(axis=1)
    assert np.abs(bias).max() < 5 * np.diff(STICK_LEVELS).max() / np.sqrt(4_000)


def test_sticks_are_rounded_between_the_levels_that_a_search_finds() -> None:
    edges = np.concatenate([STICK_LEVELS, np.nextafter(STICK_LEVELS, 0), np.linspace(0, 1, 4097)])
    fractions = np.concatenate([edges, np.random.default_rng(0).random(20_000) ** 4])
    below = np.minimum(np.searchsorted(STICK_LEVELS, fractions, side="right") - 1, 62)
    never, always = np.ones(len(fractions)), np.full(len(fractions), -1.0)
    np.testing.assert_array_equal(quantise_sticks(fractions, never), below)
    np.testing.assert_array_equal(quantise_sticks(fractions, always), below + 1)


def test_the_draws_are_pinned_on_every_machine() -> None:
    digest = hashlib.sha256(uniforms(123456789, 100, 17).tobytes()).hexdigest()
    assert digest[:16] == "e1ce0fb65a7845ae"


@pytest.mark.parametrize("k", [1, 12, 50])
def test_top_k_and_rest_are_a_distribution_and_bound_the_full_kl_from_below(k: int) -> None:
    logits_PV = peaked_logits(30, 3_000, seed=k)
    student_PV = torch.log_softmax(
        logits_PV + torch.randn(logits_PV.shape, generator=torch.Generator().manual_seed(2)), -1
    ).double()
    measured = measure(logits_PV.clone(), torch.zeros(30, dtype=torch.int64))
    kept = top_k(measured, k=k)
    probs_PK, rest_P = unpack_top_k(kept.logprobs_PK.numpy(), kept.rest_logprobs_P.numpy())
    np.testing.assert_allclose(probs_PK.sum(axis=1) + rest_P, 1.0, atol=1e-5)
    student_PK = student_PV.gather(1, kept.token_ids_PK).exp().numpy()
    coarse_P = (probs_PK * np.log(probs_PK / student_PK)).sum(axis=1)
    coarse_P += rest_P * np.log(rest_P / (1 - student_PK.sum(axis=1)))
    teacher_PV = torch.log_softmax(logits_PV.double(), -1)
    full_P = (teacher_PV.exp() * (teacher_PV - student_PV)).sum(-1).numpy()
    assert (coarse_P <= full_P + 1e-5).all()


def test_measure_gives_the_entropy_and_the_next_token_of_a_float64_reference() -> None:
    logits_PV = peaked_logits(25, 4_001, seed=8) * 3
    logits_PV[:, 17] = float("-inf")
    next_P = torch.randint(18, 4_001, (25,), generator=torch.Generator().manual_seed(3))
    measured = measure(logits_PV.clone(), next_P)
    logprobs_PV = torch.log_softmax(logits_PV.double(), -1)
    entropies_P = -torch.xlogy(logprobs_PV.exp(), logprobs_PV.exp()).sum(-1)
    torch.testing.assert_close(measured.entropies_P.double(), entropies_P, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        measured.next_token_logprobs_P.double(),
        logprobs_PV.gather(1, next_P[:, None])[:, 0],
        atol=1e-5,
        rtol=1e-6,
    )
    assert measured.finite


def test_a_position_without_a_distribution_is_seen() -> None:
    logits_PV = torch.zeros(3, 50)
    logits_PV[1, 4] = float("nan")
    assert not measure(logits_PV, torch.zeros(3, dtype=torch.int64)).finite
