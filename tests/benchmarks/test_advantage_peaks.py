"""Peaks of advantages by hand, and the optimum of ADPA's two terms against its own gradient."""

import pytest
import torch

from benchmarks.methods.advantage_peaks import limits, optimum, peaks_of

F64 = torch.float64


def test_peaks_by_hand() -> None:
    """One position's peak is a token that nobody would write, the other's a likely one."""
    reference_PV = torch.tensor([[0.5, 0.4999, 1e-4], [0.5, 0.25, 0.25]], dtype=F64).log()
    aligned_PV = torch.tensor([[0.6, 0.39, 1e-2], [0.25, 0.5, 0.25]], dtype=F64).log()
    found = peaks_of(aligned_PV, reference_PV, torch.tensor([0, 2]), [])
    ratios = torch.tensor([100.0, 2.0, 1.2, 1.0, 0.39 / 0.4999, 0.5], dtype=F64).log().tolist()
    assert found.largest == pytest.approx((ratios[0] + ratios[1]) / 2)
    assert found.written == pytest.approx((ratios[2] + ratios[3]) / 2)
    kls = (
        0.6 * ratios[2] + 0.39 * ratios[4] + 0.01 * ratios[0],
        0.25 * ratios[5] + 0.5 * ratios[1] + 0.25 * ratios[3],
    )
    assert found.aligned == pytest.approx(sum(kls) / 2)
    assert found.unlikely == 0.5 and found.on_unlikely == pytest.approx(0.5e-4)


def test_the_limit_and_what_lies_beyond_it_by_hand() -> None:
    """p = (1/2, 1/2, 0), A = (0, 1, 2): the limit is 3/4; 1/2 is at the golden ratio below it."""
    anchors_PV = torch.tensor([[0.5, 0.5, 0.0]], dtype=F64)
    advantages_PV = torch.tensor([[0.0, 1.0, 2.0]], dtype=F64)
    assert limits(anchors_PV, advantages_PV).tolist() == [0.75]
    anchors_PV[0, 2] = 1e-12  # next to nothing
    golden = (5**0.5 - 1) / 2
    below = optimum(anchors_PV, advantages_PV, 0.5)[0]
    assert below.tolist() == pytest.approx([1 - golden, golden, 0.0], abs=1e-9)
    beyond = optimum(anchors_PV, advantages_PV, 1.5)[0]
    assert beyond.tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2], abs=1e-9)


@pytest.mark.parametrize("weight", [0.05, 0.5, 5.0])
def test_no_gradient_is_left_at_the_optimum(weight: float) -> None:
    """Autograd of the objective in logits knows nothing of multipliers."""
    torch.manual_seed(0)
    anchors_PV = (4 * torch.randn(6, 9, dtype=F64)).softmax(dim=1)
    advantages_PV = torch.randn(6, 9, dtype=F64)
    best_PV = optimum(anchors_PV, advantages_PV, weight)
    assert best_PV.sum(dim=1).tolist() == pytest.approx([1.0] * 6)
    logits_PV = best_PV.log().requires_grad_()
    logprobs_PV = logits_PV.log_softmax(dim=1)
    objective = -(anchors_PV * logprobs_PV + weight * logprobs_PV.exp() * advantages_PV).sum()
    (gradient_PV,) = torch.autograd.grad(objective, logits_PV)
    assert gradient_PV.abs().max() < 1e-9


def test_the_optimum_counts_the_tokens_that_the_reference_would_not_write() -> None:
    reference_PV = torch.tensor([[0.5, 0.5 - 1e-9, 1e-9]], dtype=F64).log()
    aligned_PV = reference_PV + torch.tensor([[0.0, 1.0, 2.0]], dtype=F64)
    found = peaks_of(aligned_PV, reference_PV, torch.tensor([0]), [0.5, 1.5])
    assert found.limit == pytest.approx(0.75, abs=1e-6)
    assert found.optima == pytest.approx((0.0, 0.5), abs=1e-6)
