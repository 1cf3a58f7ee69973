"""The error of a drawn gradient that is expected over draws, from the probabilities themselves.

A token of difference d that is kept with probability i stands for ``d / i``, so what it adds to a
sum with the student's pi is off by ``pi d`` times something of variance ``1 / i - 1``; one that is
sure is off by the rounding of its value. Squares are summed over tokens and positions. Draws of
positions are independent, so this is the error of the sum over all positions too. Left out is that
a position's gradient is taken off its own mean, which moves it little.

A few draws tell the same with luck: most of the expected square is of tokens that come once in
thousands of positions.

Dimensions: C = positions of a chunk, V = vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from schemas.advantage_values import LEVEL_SIZES
from stages.signals.advantages.drawing import weighed
from stages.signals.advantages.stage import ThresholdSupport
from stages.signals.advantages.supports import Scored, StudentTop, mean_distribution

_LEAST_ADVANTAGE = 1e-4  # as in ``supports``
_HALVINGS = 40


def expected_square(
    support: ThresholdSupport, scored: Scored, student: StudentTop, probs_CV: Tensor
) -> float:
    """Return the expected square of the error, summed over tokens and positions."""
    if support.tau is None or support.max_k is None:
        advantages_CV = scored.advantages()
        chances_CV = _of_fixed_size(scored, student, advantages_CV, support.k or 0)
        return _square(probs_CV * advantages_CV, chances_CV)
    found = weighed(scored, student, tau=support.tau, max_k=support.max_k)
    drawn = _square(probs_CV * found.differences_PV, found.chances_PV)
    is_sure_CV = found.chances_PV == 1.0
    sizes = found.differences_PV[is_sure_CV].double().abs().numpy()
    low = np.minimum(np.searchsorted(LEVEL_SIZES, sizes, side="right"), len(LEVEL_SIZES) - 1) - 1
    rounding = (sizes - LEVEL_SIZES[low]) * (LEVEL_SIZES[low + 1] - sizes)
    return drawn + float((probs_CV[is_sure_CV].double().numpy() ** 2 * rounding).sum())


def _square(shares_CV: Tensor, chances_CV: Tensor) -> float:
    odds_CV = chances_CV.double().clamp(min=1e-12).reciprocal_().sub_(1.0)
    return float((shares_CV.double().square_() * odds_CV).sum())


def _of_fixed_size(scored: Scored, student: StudentTop, advantages_CV: Tensor, k: int) -> Tensor:
    """Return ``min(1, w / tau)`` with the tau of each position that makes them sum to ``k``."""
    weights_CV, _ = mean_distribution(scored, student)
    weights_CV *= advantages_CV.abs().clamp_(min=_LEAST_ADVANTAGE * scored.beta)
    low_C1, high_C1 = torch.zeros(len(weights_CV), 1), weights_CV.sum(dim=1, keepdim=True)
    for _ in range(_HALVINGS):
        tau_C1 = (low_C1 + high_C1) / 2
        is_low_C1 = (weights_CV / tau_C1).clamp_(max=1.0).sum(dim=1, keepdim=True) > k
        low_C1 = torch.where(is_low_C1, tau_C1, low_C1)
        high_C1 = torch.where(is_low_C1, high_C1, tau_C1)
    return (weights_CV / high_C1).clamp_(max=1.0)
