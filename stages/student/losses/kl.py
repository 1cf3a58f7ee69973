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

**Padding.** Ids from n on, the first that no token uses, are rows that pad a teacher's matrix, and
models of one tokenizer have different numbers of them. What is trained on is therefore not p but
``q_v = p_v / P`` for v < n, and 0 beyond, with ``P = sum_{u < n} p_u``. Of ``exact`` it is the
softmax of the first n logits. Of ``threshold`` the kept entries below n share out what the others
had, ``w_i / sum_{j: v_j < n} w_j``, a ratio of unbiased estimates whose bias is a fraction of order
1 - P; the entropy is ``H(q) = (H(p) + sum_{v >= n} p_v log p_v) / P + log P`` by the same entries,
whose p is taken to be their weight: a sampled one has less, so the KL (not its gradient) is a
little low, by a few times 1 - P.
Of ``top_k`` kept ids beyond n go and what is left, the rest included, is divided by its sum; what
the rest has of padding (at most its number of rows times the smallest kept p) cannot be told from
it and stays. A position of which nothing is left has no KL and no gradient of it. The mean of what
was dropped, 1 - P, is reported as ``dropped_mass``. The student's softmax has all of its rows, as
it has wherever the student is run: q is 0 on its padding, which is pushed down.

Dimensions: N = scored positions, C = positions of one chunk, V = vocabulary of the student,
K = kept entries, D = hidden width of the teacher, U <= V = ids that tokens use. All values in nats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from stages.models.causal_lm.language_head import LanguageHead
from stages.student.losses.cross_entropy import add_one_hot_, weigh_gradient_, weighted


class Divergence(NamedTuple):
    """KL [C] to what is trained on, and the mass [C] that was dropped, on padding ids."""

    kl_C: Tensor
    dropped_C: Tensor


class Told(NamedTuple):
    """The teacher's log-probs [C, U] over tokens alone, and the mass [C] dropped on other ids."""

    logprobs_CU: Tensor
    dropped_C: Tensor


class Teacher(Protocol):
    """The cached distributions of all scored positions of a batch, in one encoding."""

    EXTRA_BLOCKS: ClassVar[int]  # [C, V] blocks made beside the student's log-probs

    def kl_(self, logprobs_CV: Tensor, rows: slice, weight: float | None) -> Divergence:
        """Return the KL from the student's log-probs, which are overwritten.

        With ``weight`` they become ``weight * dKL/dlogits + (1 - weight) * softmax``.
        """

    def top_token_ids(self, rows: slice) -> Tensor:
        """Return [C] the teacher's likeliest tokens, -1 where the encoding does not tell."""


@dataclass(frozen=True, slots=True)
class ThresholdTeacher:
    """K weighted tokens a position; each position's weights sum to one.

    Dropped entries have weight 0; where nothing is left (``untaught_N``) so has the entropy.
    """

    EXTRA_BLOCKS: ClassVar[int] = 0

    token_ids_NK: Tensor
    weights_NK: Tensor
    num_head_N: Tensor
    entropies_N: Tensor
    dropped_N: Tensor | None = None
    untaught_N: Tensor | None = None

    def kl_(self, logprobs_CV: Tensor, rows: slice, weight: float | None) -> Divergence:
        """Estimate the KL; a token drawn twice counts twice, in the gradient too."""
        ids_CK = self.token_ids_NK[rows].long()
        weights_CK = self.weights_NK[rows].to(logprobs_CV.dtype)
        kept_C: Tensor = torch.linalg.vecdot(weights_CK, logprobs_CV.gather(1, ids_CK))
        if weight is not None:
            logprobs_CV.exp_().scatter_add_(1, ids_CK, weights_CK * -weight)
            _leave_out_(logprobs_CV, self.untaught_N, rows, weight)
        kl_C = -kept_C - self.entropies_N[rows]
        return Divergence(kl_C, _dropped(self.dropped_N, rows, kl_C))

    def top_token_ids(self, rows: slice) -> Tensor:
        """Entry 0, where there is a head: the head comes first, by falling probability."""
        first_C = self.token_ids_NK[rows, 0].long()
        return torch.where(self.num_head_N[rows] > 0, first_C, -1)


@dataclass(frozen=True, slots=True)
class TopKTeacher:
    """K probabilities a position and the mass of the rest; each position sums to one.

    A dropped entry is another of the position's ids once more, with probability 0; where nothing is
    left (``untaught_N``) the rest is 0 too.
    """

    EXTRA_BLOCKS: ClassVar[int] = 0

    token_ids_NK: Tensor
    probs_NK: Tensor
    rest_N: Tensor
    dropped_N: Tensor | None = None
    untaught_N: Tensor | None = None

    def kl_(self, logprobs_CV: Tensor, rows: slice, weight: float | None) -> Divergence:
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
            logprobs_CV.scatter_(1, ids_CK, kept_CK.exp())
            logprobs_CV.scatter_add_(1, ids_CK, probs_CK * -weight)
            _leave_out_(logprobs_CV, self.untaught_N, rows, weight)
        kept_C = (torch.xlogy(probs_CK, probs_CK) - probs_CK * kept_CK).sum(dim=1)
        cross_C = torch.where(rest_C > 0, rest_C * log_rest_C, 0.0)
        kl_C = kept_C + torch.xlogy(rest_C, rest_C) - cross_C
        return Divergence(kl_C, _dropped(self.dropped_N, rows, kl_C))

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

    def kl_(self, logprobs_CV: Tensor, rows: slice, weight: float | None) -> Divergence:
        """Return the KL; a student's tokens beyond the teacher's have teacher probability 0."""
        logits_CV = self.head.logits(self.hidden_ND[rows]).to(logprobs_CV.dtype)
        entropies_C = self.entropies_N[rows]
        dropped_C = _dropped(None, rows, logprobs_CV[:, 0])
        num_ids = self.head.num_token_ids
        if num_ids is not None and num_ids < logits_CV.shape[1]:
            whole_C = logits_CV.logsumexp(dim=1)
            dropped_C = (logits_CV[:, num_ids:].logsumexp(dim=1) - whole_C).exp()
            logits_CV = logits_CV[:, :num_ids]
            log_total_C = logits_CV.logsumexp(dim=1)
            probs_CV = logits_CV.softmax(dim=1)
            entropies_C = log_total_C - torch.linalg.vecdot(probs_CV, logits_CV)
        else:
            probs_CV = logits_CV.softmax(dim=1)
        known_CV = logprobs_CV[:, : probs_CV.shape[1]]
        kept_C: Tensor = torch.linalg.vecdot(probs_CV, known_CV)
        if weight is not None:
            logprobs_CV.exp_()
            known_CV.sub_(probs_CV, alpha=weight)
        return Divergence(-kept_C - entropies_C, dropped_C)

    def logprobs(self, rows: slice, temperature: float, dtype: torch.dtype) -> Told:
        """Return what is trained on, in ``dtype``, its logits divided by ``temperature``."""
        logits_CU = self.head.logits(self.hidden_ND[rows]).to(dtype)
        dropped_C = logits_CU.new_zeros(len(logits_CU))
        num_ids = self.head.num_token_ids
        if num_ids is not None and num_ids < logits_CU.shape[1]:
            whole_C = logits_CU.logsumexp(dim=1)
            dropped_C = (logits_CU[:, num_ids:].logsumexp(dim=1) - whole_C).exp()
            logits_CU = logits_CU[:, :num_ids]
        if temperature != 1.0:
            logits_CU.div_(temperature)
        return Told(logits_CU.log_softmax(dim=1), dropped_C)

    def top_token_ids(self, rows: slice) -> Tensor:
        """The argmax of the teacher's logits."""
        return self.head.logits(self.hidden_ND[rows])[:, : self.head.num_token_ids].argmax(dim=1)


def _leave_out_(grad_CV: Tensor, untaught_N: Tensor | None, rows: slice, weight: float) -> None:
    """Take the KL's part out of the gradient of positions without a teacher: a softmax is there."""
    if untaught_N is not None:
        grad_CV.mul_(1.0 - weight * untaught_N[rows, None].to(grad_CV.dtype))


def _dropped(dropped_N: Tensor | None, rows: slice, like_C: Tensor) -> Tensor:
    return torch.zeros_like(like_C) if dropped_N is None else dropped_N[rows].to(like_C.dtype)


def _finite(values_C: Tensor) -> Tensor:
    """Replace -inf by 0: the largest of no values, where the K kept tokens are the vocabulary."""
    return torch.where(values_C.isinf(), 0.0, values_C)


@dataclass(frozen=True, slots=True)
class Kd:
    """The objective over all scored positions of a batch; ``weight`` is the share of the KL.

    With ``weights_N`` a position's losses and gradient are multiplied by its own weight.
    """

    SUMS: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy", "kl", "dropped_mass")

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
        found = self.teacher.kl_(logprobs_CV, rows, self.weight if with_grad else None)
        kl = weighted(found.kl_C, self.weights_N, rows).sum()
        dropped = weighted(found.dropped_C, self.weights_N, rows).sum()
        if with_grad:
            if self.weight < 1.0:
                add_one_hot_(logprobs_CV, next_C1, self.weight - 1.0)
            weigh_gradient_(logprobs_CV, self.weights_N, rows)
        loss = self.weight * kl + (1.0 - self.weight) * cross_entropy
        return torch.stack([loss, cross_entropy, kl, dropped.to(loss)])


def _threshold(batch: Mapping[str, Tensor], head: LanguageHead | None) -> Teacher:
    return ThresholdTeacher(
        token_ids_NK=batch["token_ids_NK"],
        weights_NK=batch["weights_NK"],
        num_head_N=batch["num_head_N"],
        entropies_N=batch["entropies_N"],
        dropped_N=batch["dropped_N"],
        untaught_N=batch.get("untaught_N"),
    )


def _top_k(batch: Mapping[str, Tensor], head: LanguageHead | None) -> Teacher:
    return TopKTeacher(
        token_ids_NK=batch["token_ids_NK"],
        probs_NK=batch["probs_NK"],
        rest_N=batch["rest_N"],
        dropped_N=batch["dropped_N"],
        untaught_N=batch.get("untaught_N"),
    )


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
