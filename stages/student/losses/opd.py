"""The clipped surrogate of on-policy distillation, at tokens that an earlier student sampled.

With y a token that the writer sampled, s the student, p the teacher and q the writer, all of them
at the same prefix:

    A = log p(y) - log s(y), held constant        (arXiv 2604.13010, equation 2)
    r = s(y) / q(y)
    loss = -min(r A, clip(r, 1 - eps, 1 + eps) A) (PPO's, arXiv 1707.06347, equation 7)

With y drawn from q, ``r A`` has the mean ``-KL(s || p)``, and where nothing is clipped the mean of
the gradient is that of ``KL(s || p)`` at the prefix: ``sum_y s(y) (log p - log s) grad log s``. The
prefix itself stays the writer's. ``clip`` None leaves r out, as the paper does (its w is 1): loss
``-A log s(y)``, A constant, whose gradient is the one above while s is q.

How far s has gone from q is estimated from the same tokens: k1 = ``-log r``, whose mean is
``KL(q || s)``, and k3 = ``r - 1 - log r`` (Schulman, "Approximating KL divergence", 2020), of the
same mean, never negative and of less variance. Of tokens that were not drawn from q itself (another
temperature, top_p below 1) none of these means is exact.

Dimensions: N = sampled tokens, C = tokens of one chunk, V = vocabulary. All values in nats.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class OnPolicyDistillation:
    """The loss over all sampled tokens of a batch.

    ``max_advantage`` bounds A on both sides. SUMS: ``reverse_kl`` estimates KL(student || teacher)
    at the writer's prefixes, ``clipped`` counts tokens without a gradient, ``staleness`` is k3.
    """

    SUMS: ClassVar[tuple[str, ...]] = (
        *("loss", "reverse_kl", "ratio", "clipped", "staleness", "staleness_k1"),
    )

    token_ids_N: Tensor
    teacher_logprobs_N: Tensor
    writer_logprobs_N: Tensor
    clip: float | None = 0.2
    max_advantage: float | None = None

    @property
    def extra_blocks(self) -> int:
        """None: all is done in place."""
        return 0

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return the sums of ``SUMS``; see ``chunked_loss.PositionLoss``."""
        ids_C1 = self.token_ids_N[rows, None]
        own_C = logprobs_CV.gather(1, ids_C1)[:, 0]
        log_ratio_C = own_C - self.writer_logprobs_N[rows].to(own_C)
        ratio_C = log_ratio_C.exp()
        advantage_C = self.teacher_logprobs_N[rows].to(own_C) - own_C
        reverse_kl = -(ratio_C * advantage_C).sum()
        if self.max_advantage is not None:
            advantage_C = advantage_C.clamp(-self.max_advantage, self.max_advantage)
        loss_C, weight_C, clipped_C = self._surrogate(own_C, ratio_C, advantage_C)
        if with_grad:
            logprobs_CV.exp_().mul_(weight_C[:, None])
            logprobs_CV.scatter_add_(1, ids_C1, -weight_C[:, None])
        k3 = (ratio_C - 1.0 - log_ratio_C).sum()
        sums = (loss_C.sum(), reverse_kl, ratio_C.sum(), clipped_C.sum(), k3, -log_ratio_C.sum())
        return torch.stack([value.to(own_C) for value in sums])

    def _surrogate(
        self, own_C: Tensor, ratio_C: Tensor, advantage_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, minus its derivative by log s(y), and whether it was clipped; each [C]."""
        if self.clip is None:
            return -advantage_C * own_C, advantage_C, torch.zeros_like(own_C, dtype=torch.bool)
        free_C = ratio_C * advantage_C
        bound_C = ratio_C.clamp(1.0 - self.clip, 1.0 + self.clip) * advantage_C
        clipped_C = bound_C < free_C
        weight_C = torch.where(clipped_C, 0.0, free_C)
        return -torch.minimum(free_C, bound_C), weight_C, clipped_C
