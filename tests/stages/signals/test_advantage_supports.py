"""Each support's maths against the full vocabulary in float64, and the published worked example."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from schemas.distribution import uniforms
from stages.signals.advantages.supports import (
    Scored,
    StudentTop,
    mean_distribution,
    released_support,
    threshold_support,
    union_support,
)

F64Array = npt.NDArray[np.float64]


def scored_of(aligned_PV: Any, reference_PV: Any, *, beta: float = 1.0) -> Scored:
    """From probabilities [P, V]."""
    logs = [
        torch.as_tensor(np.asarray(p, np.float64)).log().float() for p in (aligned_PV, reference_PV)
    ]
    return Scored(logs[0], logs[1], torch.zeros(len(logs[0]), dtype=torch.long), beta)


def student_of(probs_PV: Any, *, keep: int) -> StudentTop:
    top = torch.as_tensor(np.asarray(probs_PV, np.float32)).topk(keep, dim=1)
    return StudentTop(top.indices, top.values.log())


def random_probs(rng: np.random.Generator, vocab_size: int, *, sharpness: float) -> F64Array:
    return softmax(rng.normal(size=vocab_size) * sharpness)


def softmax(logits_V: F64Array) -> F64Array:
    exp_V = np.exp(logits_V - logits_V.max())
    return np.asarray(exp_V / exp_V.sum())


def three_models(kind: str) -> tuple[F64Array, F64Array, F64Array]:
    """Aligned teacher, reference and student [V] of one position."""
    rng = np.random.default_rng(5)
    vocab_size = {"wide": 49_152, "wider": 151_936}.get(kind, 307)
    base_V = rng.normal(size=vocab_size) * 3.0
    if kind == "ties":
        base_V = np.round(base_V)
        return softmax(base_V), softmax(np.round(base_V / 2)), softmax(base_V)
    if kind == "one-hot":
        base_V = np.where(np.arange(vocab_size) == 7, 40.0, -base_V)
    if kind == "flat":
        base_V = np.zeros(vocab_size)
    moved = [base_V + rng.normal(size=vocab_size) * by for by in (0.3, 0.0, 0.8)]
    aligned_V, reference_V, student_V = (softmax(logits_V) for logits_V in moved)
    return aligned_V, reference_V, student_V


def estimates(kind: str, *, k: int, num_draws: int) -> tuple[F64Array, float]:
    """``sum_k pi(a_k) A(a_k) / inclusion_k`` of many draws, and the sum over the vocabulary."""
    aligned_V, reference_V, student_V = three_models(kind)
    draws_P = torch.from_numpy(uniforms(3, num_draws, 1)[:, 0].copy())
    found = []
    for start in range(0, num_draws, 64):
        offsets_P = draws_P[start : start + 64]
        ones = np.ones((len(offsets_P), 1))
        scored = scored_of(aligned_V * ones, reference_V * ones, beta=0.5)
        kept = threshold_support(scored, student_of(student_V * ones, keep=6), offsets_P, k=k)
        pi_PK = torch.from_numpy(student_V)[kept.token_ids_PK]
        weights_PK = (-kept.log_inclusions_PK.double()).exp()
        found.append((pi_PK * kept.advantages_PK.double() * weights_PK).sum(1))
    full = 0.5 * float(student_V @ (np.log(aligned_V) - np.log(reference_V)))
    return torch.cat(found).numpy(), full


@pytest.mark.parametrize(
    ("kind", "num_draws"),
    [
        ("random", 2000),
        ("ties", 2000),
        ("one-hot", 1000),
        ("flat", 2000),
        ("wide", 96),
        ("wider", 32),
    ],
)
def test_the_mean_over_draws_is_the_sum_over_the_vocabulary(kind: str, num_draws: int) -> None:
    sums, full = estimates(kind, k=16, num_draws=num_draws)
    standard_error = sums.std() / len(sums) ** 0.5
    assert abs(sums.mean() - full) < 4 * standard_error + 1e-6 * max(1.0, abs(full))


@pytest.mark.parametrize("kind", ["random", "ties", "one-hot", "flat"])
def test_inclusions_are_how_often_each_token_is_drawn(kind: str) -> None:
    """All offsets in turn, 2,000 of them: no chance is left but where two of them meet."""
    aligned_V, reference_V, student_V = three_models(kind)
    num_draws, k = 2000, 12
    ones = np.ones((num_draws, 1))
    offsets_P = (torch.arange(num_draws) + 0.5) / num_draws
    scored = scored_of(aligned_V * ones, reference_V * ones)
    student = student_of(student_V * ones, keep=6)
    kept = threshold_support(scored, student, offsets_P, k=k)
    mean_V = completed_mean(aligned_V, reference_V, student)
    advantages_V = np.log(aligned_V) - np.log(reference_V)
    expected_V = inclusions_of(mean_V * np.maximum(np.abs(advantages_V), 1e-4), k)
    drawn = torch.bincount(kept.token_ids_PK.flatten(), minlength=len(mean_V)).numpy()
    assert {len(set(ids)) for ids in kept.token_ids_PK.tolist()} == {k}
    # A token's share of the running sum begins and ends between two offsets.
    np.testing.assert_allclose(drawn / num_draws, expected_V, atol=1.5 / num_draws)
    stored_PK = kept.log_inclusions_PK.double().exp().numpy()
    np.testing.assert_allclose(stored_PK, expected_V[kept.token_ids_PK.numpy()], rtol=1e-3)


def completed_mean(aligned_V: F64Array, reference_V: F64Array, student: StudentTop) -> F64Array:
    """The mean of three distributions, of which the student's is known at some tokens."""
    known, probs = student.token_ids_PS[0].numpy(), student.logprobs_PS[0].exp()
    guess_V = np.sqrt(aligned_V + reference_V)
    guess_V[known] = 0.0
    guess_V *= max(0.0, 1.0 - float(probs.sum())) / guess_V.sum()
    guess_V[known] = probs.numpy()
    return np.asarray((aligned_V + reference_V + guess_V) / 3)


def inclusions_of(mass_V: F64Array, k: int) -> F64Array:
    """Solve sum(min(1, m / tau)) = k by bisection."""
    low, high = 0.0, mass_V.sum()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if np.minimum(1, mass_V / tau).sum() > k else (low, tau)
    return np.asarray(np.minimum(1.0, mass_V / high))


def test_tokens_that_the_teachers_do_not_have_are_no_part_of_the_mean() -> None:
    aligned_V, reference_V, _ = three_models("random")
    student = StudentTop(torch.tensor([[9, 4000]]), torch.tensor([[0.7, 0.2]]).log())
    scored = scored_of(aligned_V[None], reference_V[None])
    known_here = StudentTop(torch.tensor([[9, 0]]), torch.tensor([[0.7, 0.0]]).log())
    expected_V = completed_mean(aligned_V, reference_V, known_here)
    # A foreign id stands as token 0 with no mass, whose guess is lost: a guess may be any.
    mean_V = mean_distribution(scored, student)[0][0].double().numpy()
    np.testing.assert_allclose(mean_V, expected_V, rtol=1e-5, atol=1e-9)
    kept = threshold_support(scored, student, torch.tensor([0.5]), k=8)
    assert int(kept.token_ids_PK.max()) < len(aligned_V)


def test_models_that_agree_are_drawn_from_too() -> None:
    aligned_V, _, student_V = three_models("random")
    scored = scored_of(aligned_V[None], aligned_V[None])
    kept = threshold_support(scored, student_of(student_V[None], keep=6), torch.tensor([0.5]), k=8)
    assert not kept.advantages_PK.any() and len(set(kept.token_ids_PK[0].tolist())) == 8
    assert bool(torch.isfinite(kept.log_inclusions_PK).all())


def test_kept_advantages_are_float32_differences() -> None:
    aligned_V, reference_V, student_V = three_models("random")
    scored = scored_of(aligned_V[None], reference_V[None], beta=0.25)
    kept = threshold_support(scored, student_of(student_V[None], keep=6), torch.tensor([0.3]), k=16)
    full_V = 0.25 * (np.log(aligned_V) - np.log(reference_V))
    np.testing.assert_allclose(kept.advantages_PK[0], full_V[kept.token_ids_PK[0]], atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "ties", "one-hot", "flat", "wide"])
def test_the_union_is_distinct_exact_and_complete(kind: str) -> None:
    aligned_V, reference_V, student_V = three_models(kind)
    k = 5
    scored = scored_of(aligned_V[None], reference_V[None], beta=2.0)
    student = student_of(student_V[None], keep=8)
    kept = union_support(scored, student, k=k)
    ids = kept.token_ids_E.tolist()
    assert ids == sorted(set(ids)) and kept.num_entries_P.tolist() == [len(ids)]
    assert set(student.token_ids_PS[0, :k].tolist()) <= set(ids)
    for probs_V in (aligned_V, reference_V):
        chosen = np.sort(probs_V.astype(np.float32))[-k]
        assert set(np.flatnonzero(probs_V > chosen * (1 + 1e-6))) <= set(ids)
    full_V = 2.0 * (np.log(aligned_V) - np.log(reference_V))
    np.testing.assert_allclose(kept.advantages_E, full_V[ids], atol=2e-5)
    rest_V = np.ones(len(full_V), bool)
    rest_V[ids] = False
    rest = 2.0 * (np.log(aligned_V[rest_V].sum()) - np.log(reference_V[rest_V].sum()))
    np.testing.assert_allclose(kept.rest_advantages_P, [rest], atol=2e-4)


def test_a_rest_of_a_millionth_of_a_millionth_keeps_its_advantage() -> None:
    """One minus the kept mass is 0 or rounding there, and its logarithm nothing at all."""
    rest_V = np.array([3e-13, 1e-13, 2e-13])
    aligned_V = np.array([0.7, 0.3, *rest_V])
    reference_V = np.array([0.6, 0.4, *(rest_V * [1, 2, 4])])
    scored = scored_of(aligned_V[None], reference_V[None])
    student = StudentTop(torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.4]]).log())
    kept = union_support(scored, student, k=2)
    assert kept.token_ids_E.tolist() == [0, 1]
    expected = np.log(rest_V.sum() / (rest_V * [1, 2, 4]).sum())
    np.testing.assert_allclose(kept.rest_advantages_P, [expected], rtol=1e-5)


def test_a_union_of_everything_leaves_an_empty_rest() -> None:
    aligned_V, reference_V = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    scored = scored_of(aligned_V[None], reference_V[None])
    student = StudentTop(torch.tensor([[0, 1, 99]]), torch.zeros(1, 3))
    kept = union_support(scored, student, k=3)
    assert kept.token_ids_E.tolist() == [0, 1, 2] and kept.rest_advantages_P.tolist() == [0.0]


def test_positions_of_a_union_lie_end_to_end() -> None:
    rng = np.random.default_rng(2)
    aligned_PV, reference_PV = (
        np.stack([random_probs(rng, 40, sharpness=s) for s in (0.5, 2.0, 6.0)]) for _ in range(2)
    )
    student = student_of(reference_PV, keep=4)
    kept = union_support(scored_of(aligned_PV, reference_PV), student, k=4)
    ends = np.cumsum([0, *kept.num_entries_P.tolist()])
    for p in range(3):
        one = scored_of(aligned_PV[p : p + 1], reference_PV[p : p + 1])
        alone = union_support(one, StudentTop(*(part(student, p))), k=4)
        at = slice(ends[p], ends[p + 1])
        assert kept.token_ids_E[at].tolist() == alone.token_ids_E.tolist()
        assert torch.equal(kept.advantages_E[at], alone.advantages_E)
        assert kept.rest_advantages_P[p] == alone.rest_advantages_P[0]


def part(student: StudentTop, p: int) -> tuple[Tensor, Tensor]:
    return student.token_ids_PS[p : p + 1], student.logprobs_PS[p : p + 1]


def test_the_published_example() -> None:
    """Aligned {a .6, b .3, c .05}, reference {a .5, b .4} with c missing, student {.4, .3, .1}."""
    aligned_V = np.array([0.6, 0.3, 0.05, *[0.01] * 5])
    reference_V = np.array([0.5, 0.4, 0.01, 0.05, *[0.01] * 4])
    kept = released_support(scored_of(aligned_V[None], reference_V[None]), k=3)
    assert kept.token_ids_PK.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(kept.advantages_PK, [[0.18232, -0.28768, 0.0]], atol=5e-6)
    student_K = torch.tensor([0.4, 0.3, 0.1])
    assert float(kept.advantages_PK[0] @ student_K) == pytest.approx(-0.013376, abs=1e-6)
    clipped_K = kept.advantages_PK[0].clamp(1e-8, 1 - 1e-8)
    assert float(clipped_K @ student_K) == pytest.approx(0.072929, abs=1e-6)


def test_the_published_floor_is_never_below_a_ten_millionth() -> None:
    aligned_V = np.array([1 - 3e-9, 2e-9, 1e-9])
    reference_V = np.array([1 - 3e-9, 1e-9, 2e-9])
    kept = released_support(scored_of(aligned_V[None], reference_V[None]), k=2)
    assert kept.token_ids_PK.tolist() == [[0, 1]]
    # Token 1 is missing in the reference's two likeliest; the smallest kept probability is 2e-9.
    assert float(kept.advantages_PK[0, 1]) == pytest.approx(np.log(2e-9 / 1e-7), abs=1e-5)


def test_a_position_without_a_distribution_is_seen() -> None:
    good_V = torch.tensor([0.5, 0.5]).log()
    bad_V = torch.tensor([float("inf"), 0.0]).log_softmax(0)
    for first_V, second_V in ((good_V, bad_V), (bad_V, good_V)):
        assert not Scored(first_V[None], second_V[None], torch.tensor([0]), 1.0).is_finite
    assert Scored(good_V[None], good_V[None], torch.tensor([0]), 1.0).is_finite
