"""Forward KL to a cached teacher in each encoding, mixed with cross-entropy.

``w KL(p || s) + (1 - w) CE``, the soft target of Hinton et al. 2015 (arXiv 1503.02531) at
temperature 1; both share one softmax, so their gradients with respect to the logits add up to one
dense and one sparse part. We differ in reporting the KL and not the cross-entropy to the soft
target, which has the same gradient.

``threshold``: the estimate of arXiv 2503.16870 (RS-KD), ``-sum_i w_i log s_i`` over the K kept
entries, less the entropy of the teacher that the cache holds in full. The weights are an unbiased
draw of p, so the mean over positions and draws is the KL, while one position's value can be
negative. We differ in the draw (see ``schemas.distribution``). Gradient ``s - w``.

``top_k``: the KL between K + 1 buckets, the kept tokens and the rest, a lower bound of the full KL
(log sum inequality). With r the teacher's mass of the rest and R the student's, the gradient is
``s_v - p_v`` on kept tokens and ``s_v (1 - r / R)`` on others. R is summed over the rest itself,
as one minus the kept mass would lose it to rounding. No value is clamped.

``exact``: p is recomputed from the cached hidden state and head. Gradient ``s - p``.

Dimensions: N = scored positions, C = positions of one chunk, V = vocabulary of the student,
K = kept entries, D = hidden width of the teacher. All values in nats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from stages.models.causal_lm.language_head import LanguageHead
from stages.student.losses.cross_entropy import add_one_hot_, weigh_gradient_, weighted


class Teacher(Protocol):
    """The cached distributions of all scored positions of a batch, in one encoding."""

    EXTRA_BLOCKS: ClassVar[int]  # [C, V] blocks made beside the student's log-probs

    def kl_(self, logprobs_CV: Tensor, rows: slice, weight: float | None) -> Tensor:
        """Return KL [C] from the student's log-probs, which are overwritten.

        With ``weight`` they become ``weight * dKL/dlogits + (1 - weight) * softmax``.
        """

    def top_token_ids(self, rows: slice) -> Tensor:
        """Return [C] the teacher's likeliest tokens, -1 where the encoding does not tell."""


@dataclass(frozen=True, slots=True)
class ThresholdTeacher:
    """K weighted tokens a position; each position's weights sum to one."""

    EXTRA_BLOCKS: ClassVar[int] = 0

    token_ids_NK: Tensor
    weights_NK: Tensor
    num_head_N: Tensor
    entropies_N: Tensor

    def kl_(self, logprobs_CV: Tensor, rows: slice, weight: float | None) -> Tensor:
        """Estimate the KL; a token drawn twice counts twice, in the gradient too."""
        ids_CK = self.token_ids_NK[rows].long()
        weights_CK = self.weights_NK[rows].to(logprobs_CV.dtype)
        kept_C: Tensor = torch.linalg.vecdot(weights_CK, logprobs_CV.gather(1, ids_CK))
        if weight is not None:
            logprobs_CV.exp_().scatter_add_(1, ids_CK, weights_CK * -weight)
        return -kept_C - self.entropies_N[rows]

    def top_token_ids(self, rows: slice) -> Tensor:
        """Entry 0, where there is a head: the head comes first, by falling probability."""
        first_C = self.token_ids_NK[rows, 0].long()
        return torch.where(self.num_head_N[rows] > 0, first_C, -1)


@dataclass(frozen=True, slots=True)
class TopKTeacher:
    """K probabilities a position and the mass of the rest; each position sums to one."""

    EXTRA_BLOCKS: ClassVar[int] = 0

    token_ids_NK: Tensor
    probs_NK: Tensor
    rest_N: Tensor

    def kl_(self, logprobs_CV: Tensor, rows: slice, weight: float | None) -> Tensor:
        """Return the KL over K + 1 buckets."""
        ids_CK = self.token_ids_NK[rows].long()
        probs_CK = self.probs_NK[rows].to(logprobs_CV.dtype)
        rest_C = self.rest_N[rows].to(logprobs_CV.dtype)
        kept_CK = logprobs_CV.gather(1, ids_CK)
        logprobs_CV.scatter_(1, ids_CK, float("-inf"))
        largest_C = _finite(logprobs_CV.amax(dim=1))
        sum_C = logprobs_CV.sub_(largest_C[:, None]).exp_().sum(dim=1)
        log_rest_C = largest_C + sum_C.log()
        if weight is not None:
            share_C = (log_rest_C.exp() - weight * rest_C) / sum_C
            logprobs_CV.mul_(torch.where(sum_C > 0, share_C, 0.0)[:, None])
            logprobs_CV.scatter_(1, ids_CK, kept_CK.exp() - weight * probs_CK)
        kept_C = (torch.xlogy(probs_CK, probs_CK) - probs_CK * kept_CK).sum(dim=1)
        cross_C = torch.where(rest_C > 0, rest_C * log_rest_C, 0.0)
        return kept_C + torch.xlogy(rest_C, rest_C) - cross_C

    def top_token_ids(self, rows: slice) -> Tensor:
        """Entry 0: entries come by falling probability."""
        return self.token_ids_NK[rows, 0].long()


@dataclass(frozen=True, slots=True)
class ExactTeacher:
    """The teacher's hidden states and its head: the whole distribution, a chunk at a time."""

    EXTRA_BLOCKS: ClassVar[int] = 2

    hidden_ND: Tensor
    entropies_N: Tensor
    head: LanguageHead

    def kl_(self, logprobs_CV: Tensor, rows: slice, weight: float | None) -> Tensor:
        """Return the KL; a student's tokens beyond the teacher's have teacher probability 0."""
        probs_CV = self.head.logits(self.hidden_ND[rows]).to(logprobs_CV.dtype).softmax(dim=1)
        known_CV = logprobs_CV[:, : probs_CV.shape[1]]
        kept_C: Tensor = torch.linalg.vecdot(probs_CV, known_CV)
        if weight is not None:
            logprobs_CV.exp_()
            known_CV.sub_(probs_CV, alpha=weight)
        return -kept_C - self.entropies_N[rows]

    def top_token_ids(self, rows: slice) -> Tensor:
        """The argmax of the teacher's logits."""
        return self.head.logits(self.hidden_ND[rows]).argmax(dim=1)


def _finite(values_C: Tensor) -> Tensor:
    """Replace -inf by 0: the largest of no values, where the K kept tokens are the vocabulary."""
    return torch.where(values_C.isinf(), 0.0, values_C)


@dataclass(frozen=True, slots=True)
class Kd:
    """The objective over all scored positions of a batch; ``weight`` is the share of the KL.

    With ``weights_N`` a position's losses and gradient are multiplied by its own weight.
    """

    SUMS: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy", "kl")

    next_token_ids_N: Tensor
    teacher: Teacher
    weight: float
    weights_N: Tensor | None = None

    @property
    def extra_blocks(self) -> int:
        """What the encoding makes."""
        return self.teacher.EXTRA_BLOCKS

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return the sums of ``SUMS``; see ``chunked_loss.PositionLoss``."""
        next_C1 = self.next_token_ids_N[rows, None]
        next_C = logprobs_CV.gather(1, next_C1)[:, 0]
        cross_entropy = -weighted(next_C, self.weights_N, rows).sum()
        kl_C = self.teacher.kl_(logprobs_CV, rows, self.weight if with_grad else None)
        kl = weighted(kl_C, self.weights_N, rows).sum()
        if with_grad:
            if self.weight < 1.0:
                add_one_hot_(logprobs_CV, next_C1, self.weight - 1.0)
            weigh_gradient_(logprobs_CV, self.weights_N, rows)
        loss = self.weight * kl + (1.0 - self.weight) * cross_entropy
        return torch.stack([loss, cross_entropy, kl])


def _threshold(batch: Mapping[str, Tensor], head: LanguageHead | None) -> Teacher:
    return ThresholdTeacher(
        token_ids_NK=batch["token_ids_NK"],
        weights_NK=batch["weights_NK"],
        num_head_N=batch["num_head_N"],
        entropies_N=batch["entropies_N"],
    )


def _top_k(batch: Mapping[str, Tensor], head: LanguageHead | None) -> Teacher:
    return TopKTeacher(batch["token_ids_NK"], batch["probs_NK"], batch["rest_N"])


def _exact(batch: Mapping[str, Tensor], head: LanguageHead | None) -> Teacher:
    assert head is not None, "the exact encoding needs the cached head"
    return ExactTeacher(batch["hidden_ND"], batch["entropies_N"], head)


# The column that only this encoding has, and what makes its teacher.
TEACHERS: dict[str, Callable[[Mapping[str, Tensor], LanguageHead | None], Teacher]] = {
    "weights_NK": _threshold,
    "rest_N": _top_k,
    "hidden_ND": _exact,
}


def teacher_of(batch: Mapping[str, Tensor], head: LanguageHead | None) -> Teacher:
    """Build the teacher of one batch; ``head`` is the cached one, for ``exact``."""
    (make,) = [make for column, make in TEACHERS.items() if column in batch]
    return make(batch, head)
