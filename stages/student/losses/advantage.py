"""The expected advantage ``sum_a pi(a) A(a)`` at a position, from what the cache keeps of A.

The inner sum of ADPA (arXiv 2502.17927, equation 11) is over the vocabulary, has its gradient
through pi alone, and equals ``beta [KL(pi || reference) - KL(pi || aligned teacher)]``. With s its
value at a position, the gradient of the sum with respect to the logits is ``pi_a (A_a - s)``.

``exact`` is the sum itself; ``threshold`` an unbiased estimate, each kept A divided by the
probability with which it was kept; ``union_top_k`` gives all tokens that are not kept one
advantage; ``as_released`` has the aligned teacher's likeliest tokens alone, for clipped advantages.

Dimensions: N = scored positions, chosen responses first, M = those of the student's responses,
C = positions of one chunk, V = vocabulary of the student, K = kept tokens. All values in nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from stages.models.causal_lm.language_head import LanguageHead
from stages.student.losses.cross_entropy import weigh_gradient_, weighted

CLIP = 1e-8, 1.0 - 1e-8  # of the published code, which shares a loader with its distributions


class Support(Protocol):
    """The cached advantages of all response positions of a batch."""

    EXTRA_BLOCKS: ClassVar[int]  # [C, V] blocks made beside the student's log-probs

    def expected_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return ``sum_a pi(a) A(a)`` [C]; ``logprobs_CV`` is overwritten.

        With ``with_grad`` it then holds the gradient of minus that sum with respect to the logits.
        """


@dataclass(frozen=True, slots=True)
class SparseSupport:
    """K tokens a position, each with a value; what no token carries is ``rest``."""

    EXTRA_BLOCKS: ClassVar[int] = 0

    token_ids_MK: Tensor
    values_MK: Tensor
    rest_M: Tensor

    def expected_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Sum over the kept tokens; one that is there twice counts twice."""
        ids_CK = self.token_ids_MK[rows]
        values_CK = self.values_MK[rows].to(logprobs_CV.dtype)
        shares_CK = logprobs_CV.gather(1, ids_CK).exp() * values_CK
        kept_C = shares_CK.sum(dim=1)
        if with_grad:
            logprobs_CV.exp_().mul_(kept_C[:, None]).scatter_add_(1, ids_CK, -shares_CK)
        return kept_C + self.rest_M[rows].to(kept_C.dtype)


@dataclass(frozen=True, slots=True)
class ExactSupport:
    """Both teachers' hidden states and heads: A over the vocabulary, a chunk at a time."""

    EXTRA_BLOCKS: ClassVar[int] = 3

    teacher_hidden_MD: Tensor
    reference_hidden_MR: Tensor
    heads: tuple[LanguageHead, LanguageHead]
    beta: float

    def expected_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Sum over the ids that tokens use; a student's others have advantage 0."""
        advantages_CV = self._advantages(rows).to(logprobs_CV.dtype)
        extra = logprobs_CV.shape[1] - advantages_CV.shape[1]
        if extra:
            advantages_CV = functional.pad(advantages_CV, (0, extra))
        logprobs_CV.exp_()
        expected_C: Tensor = torch.linalg.vecdot(logprobs_CV, advantages_CV)
        if with_grad:
            logprobs_CV.mul_(advantages_CV.neg_().add_(expected_C[:, None]))
        return expected_C

    def _advantages(self, rows: slice) -> Tensor:
        hidden = self.teacher_hidden_MD[rows], self.reference_hidden_MR[rows]
        teacher_CV, reference_CV = (
            head.logits(states)[:, : head.num_token_ids].log_softmax(dim=-1)
            for head, states in zip(self.heads, hidden, strict=True)
        )
        return teacher_CV.sub_(reference_CV).mul_(self.beta)


@dataclass(frozen=True, slots=True)
class Advantage:
    """Minus the expected advantage over the response positions of a batch."""

    SUMS: ClassVar[tuple[str, ...]] = ("loss", "advantage")

    support: Support
    weights_M: Tensor

    @property
    def extra_blocks(self) -> int:
        """What the support makes."""
        return self.support.EXTRA_BLOCKS

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return the sums of ``SUMS``; see ``chunked_loss.PositionLoss``."""
        expected_C = self.support.expected_(logprobs_CV, rows, with_grad=with_grad)
        if with_grad:
            weigh_gradient_(logprobs_CV, self.weights_M, rows)
        total = weighted(expected_C, self.weights_M, rows).sum()
        return torch.stack([-total, total])


def support_of(
    advantages: Mapping[str, Any],
    heads: tuple[LanguageHead, LanguageHead] | None,
    *,
    clipped: bool,
) -> Support:
    """Build the support that a batch of ``AdpaCollator`` holds; ``heads`` are for ``exact``.

    ``clipped`` is the published code's.
    """
    if "teacher_hidden_MD" in advantages:
        assert heads is not None, "the exact support needs both cached heads"
        hidden = advantages["teacher_hidden_MD"], advantages["reference_hidden_MR"]
        return ExactSupport(*hidden, heads, advantages["beta"])
    values_MK = advantages["values_MK"]
    if clipped:
        values_MK = values_MK.clamp(*CLIP)
    return SparseSupport(advantages["token_ids_MK"], values_MK, advantages["rest_M"])
