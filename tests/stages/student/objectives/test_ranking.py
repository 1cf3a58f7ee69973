"""BiAlign's ranking loss: the worked examples, the formula pair by pair, gradients, edge cases.

Dimensions: B = samples, N = subsets.
"""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.student.losses.ranking import MIN_RANGE, ranking_loss

F64 = torch.float64
TEACHER = [-1.0, -5.0, -2.0, -9.0]


def ranks_of(scores: list[float]) -> Tensor:
    return torch.tensor([1 + sum(other > mine for other in scores) for mine in scores])


def loss_of(student: list[float] | Tensor, ranks: Tensor, *, detach_range: bool = True) -> Tensor:
    student_N = torch.as_tensor(student, dtype=F64)
    return ranking_loss(student_N, ranks, detach_range=detach_range)


def slow_loss(student: list[float], ranks: list[int]) -> float:
    """The formula, pair by pair."""
    total, spread = 0.0, max(student) - min(student)
    for better, worse in permutations(range(len(ranks)), 2):
        if ranks[better] < ranks[worse]:
            left = (student[worse] - student[better]) / spread
            total += max(0.0, left + (ranks[worse] - ranks[better]) / (len(ranks) - 1))
    return total


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ([0.0, -2.0, -1.0, -3.0], 0.0),  # the right order and evenly spaced
        (TEACHER, 0.375),
        ([0.0, -0.2, -0.1, -3.0], 1.2),
        ([-9.0, -2.0, -5.0, -1.0], 6.7083),  # reversed
    ],
)
def test_the_worked_examples(student: list[float], expected: float) -> None:
    found = float(loss_of(student, ranks_of(TEACHER)))
    assert found == pytest.approx(expected, abs=5e-5)
    assert found == pytest.approx(slow_loss(student, ranks_of(TEACHER).tolist()), abs=1e-12)


@pytest.mark.parametrize("num_subsets", [2, 3, 5, 8])
def test_the_ranking_loss_is_the_formula(num_subsets: int) -> None:
    """Ties too: pairs of equal rank are in no sum."""
    rng = np.random.default_rng(num_subsets)
    for _ in range(20):
        student = (rng.normal(size=num_subsets) * 4).tolist()
        ranks = rng.integers(1, num_subsets + 1, num_subsets)
        found = float(loss_of(student, torch.from_numpy(ranks)))
        assert found == pytest.approx(slow_loss(student, ranks.tolist()), abs=1e-12)


def test_batches_are_their_rows() -> None:
    student_BN = torch.randn(3, 4, dtype=F64)
    ranks_BN = torch.stack([torch.randperm(4) + 1 for _ in range(3)])
    together_B = ranking_loss(student_BN, ranks_BN, detach_range=True)
    alone = [loss_of(s, r) for s, r in zip(student_BN, ranks_BN, strict=True)]
    torch.testing.assert_close(together_B, torch.stack(alone))


def test_scale_and_shift_of_the_student_do_not_matter() -> None:
    student_N, ranks = torch.tensor([-3.0, -2.5, -7.0, -1.0], dtype=F64), ranks_of(TEACHER)
    wanted = loss_of(student_N, ranks)
    for scale, shift in ((0.01, 0.0), (1.0, -40.0), (300.0, 5.0)):
        torch.testing.assert_close(loss_of(scale * student_N + shift, ranks), wanted)


def gradient_of(student: list[float], ranks: Tensor, *, detach_range: bool) -> Tensor:
    student_N = torch.tensor(student, dtype=F64, requires_grad=True)
    return torch.autograd.grad(loss_of(student_N, ranks, detach_range=detach_range), student_N)[0]


def test_two_subsets_learn_only_with_a_detached_range() -> None:
    ranks = torch.tensor([1, 2])
    assert gradient_of([-4.0, -1.0], ranks, detach_range=True).tolist() == [-1 / 3, 1 / 3]
    assert not gradient_of([-4.0, -1.0], ranks, detach_range=False).any()


@pytest.mark.parametrize("detach_range", [True, False])
def test_equal_scores_give_the_margins_and_a_finite_slope(detach_range: bool) -> None:
    student, ranks = [-2.0] * 4, ranks_of(TEACHER)
    assert float(loss_of(student, ranks)) == pytest.approx((3 * 1 + 2 * 2 + 1 * 3) / 3)
    slope_N = gradient_of(student, ranks, detach_range=detach_range)
    assert float(slope_N.abs().max()) == pytest.approx(3 / MIN_RANGE)


@pytest.mark.parametrize("detach_range", [True, False])
def test_ranking_gradients_match_finite_differences(detach_range: bool) -> None:
    """Detached, the range is a constant of the function that is differentiated."""
    start = [-3.0, -2.5, -7.0, -1.0]
    ranks, spread = ranks_of(TEACHER), max(start) - min(start)

    def function(student_N: Tensor) -> Tensor:
        if not detach_range:
            return loss_of(student_N, ranks, detach_range=False)
        pairs = [(i, j) for i, j in permutations(range(4), 2) if ranks[i] < ranks[j]]
        parts = [
            ((student_N[j] - student_N[i]) / spread + (ranks[j] - ranks[i]) / 3).clamp(min=0)
            for i, j in pairs
        ]
        return torch.stack(parts).sum()

    student_N = torch.tensor(start, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (student_N,))
    wanted = torch.autograd.grad(function(student_N), student_N)[0]
    found = gradient_of(start, ranks, detach_range=detach_range)
    torch.testing.assert_close(found, wanted)
