"""Peaks of advantages by hand: one on a likely token, one on a token that nobody would write."""

import pytest
import torch

from benchmarks.methods.advantage_peaks import peaks_of


def test_peaks_by_hand() -> None:
    reference_PV = torch.tensor([[0.5, 0.4999, 1e-4], [0.5, 0.25, 0.25]]).log()
    aligned_PV = torch.tensor([[0.6, 0.3, 1e-2], [0.25, 0.5, 0.25]]).log()
    found = peaks_of(aligned_PV, reference_PV, torch.tensor([0, 2]))
    assert found[0].exp().tolist() == pytest.approx([100.0, 2.0], rel=1e-4)
    assert found[1].exp().tolist() == pytest.approx([1.2, 1.0], rel=1e-4)
    assert found[2].tolist() == [1.0, 0.0]
