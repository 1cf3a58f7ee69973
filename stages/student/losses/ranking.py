"""BiAlign's ranking loss: the student is to order demonstration subsets as the teacher does.

BiAlign (arXiv 2312.17055, ACL 2025 version), with Q the probability of the answer after a subset
and the query, one term for each pair of subsets of which the teacher ranks R+ before R-:

    max(0, (log Q(R-) - log Q(R+)) / (max log Q - min log Q) + (rank(R-) - rank(R+)) / (N - 1))

The left part is the student's, and does not change when its log Q are scaled or shifted; ranks are
the teacher's, 1 the best. A student that equals its teacher still has a loss unless its log Q are
evenly spaced.

Where the paper is silent: pairs of equal rank are left out; the range in the denominator carries
no gradient unless ``detach_range`` is off (with it, N = 2 would never learn); and it is taken as
``MIN_RANGE`` nats where it is smaller, so that equal log Q give the margins and no infinite slope.

Dimensions: B = samples, N = subsets.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.student.losses.step import Term

MIN_RANGE = 1e-3  # nats; sums of float32 log-probs are no surer than about 1e-5


def ranking_loss(student_logprobs_BN: Tensor, ranks_BN: Tensor, *, detach_range: bool) -> Tensor:
    """Return [B] sums over all pairs of subsets (a scalar for [N]); ``ranks_BN`` are integers."""
    best = student_logprobs_BN.amax(-1, keepdim=True)
    range_B1 = (best - student_logprobs_BN.amin(-1, keepdim=True)).clamp(min=MIN_RANGE)
    if detach_range:
        range_B1 = range_B1.detach()
    ahead_BNN = student_logprobs_BN[..., None, :] - student_logprobs_BN[..., :, None]
    margins_BNN = ranks_BN[..., None, :] - ranks_BN[..., :, None]  # > 0: the row is R+
    margins_share_BNN = margins_BNN.to(ahead_BNN.dtype) / (ranks_BN.shape[-1] - 1)
    terms_BNN = ahead_BNN / range_B1[..., None] + margins_share_BNN
    return torch.where(margins_BNN > 0, terms_BNN.clamp(min=0), 0.0).sum(dim=(-2, -1))


def ranking_term(
    logprobs: Sequence[Tensor], ranks: Sequence[Tensor], *, detach_range: bool
) -> Term:
    """Return the sum of the losses of a batch's samples.

    ``ranks`` has one tensor [N] a sample; ``logprobs`` are the subsets' of all samples, end to end.
    """
    student: Any = torch.cat(list(logprobs))
    losses = [
        ranking_loss(student_N, ranks_N, detach_range=detach_range)
        for student_N, ranks_N in zip(student.split([len(r) for r in ranks]), ranks, strict=True)
    ]
    total = torch.stack(losses).sum()
    return Term(total, {"rank": total.detach()}, "samples")
