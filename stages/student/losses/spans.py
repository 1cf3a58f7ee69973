"""Approximate likelihood matching: a student's and a teacher's probabilities of spans of text.

ALM (arXiv 2503.20083). With p a teacher's and q the student's probability of the tokens of a span,
each by its own tokenizer and given all text before it, and a temperature tau:

    D(p, q) = KL(b(p) || b(q)),   b(x) = (x^(1/tau), 1 - x^(1/tau))

That the text goes on with these very bytes is taken as one of two outcomes, as nobody can sum over
all others. The paper's divergence may be any f; here it is the KL. For tau to infinity
``tau D = (log p - log q) - log p (log log p - log log q)``, and its gradient is that of
cross-entropy times ``1 - log p / log q``: it ends where the student is as sure as the teacher, and
turns round beyond.

We differ in three things. A span counts ``tau D``, which has a limit and a size beside
cross-entropy's. The sum over spans is divided by the step's scored tokens, where the paper takes
the mean over spans. And outcomes are not debiased: the paper multiplies p and q by the probability
that a new word begins behind the span. A student's log q is taken to be at most -1e-6.

**Entries.** Where a span begins, both predict what the text goes on with. The teacher's likeliest
tokens are taken as the student's tokens that their bytes begin with, p_v summed over those of one
begin; all else is one bucket, on either side:

    sum_v p_v log(p_v / q_v) + r log(r / R),   r = 1 - sum_v p_v,   R = 1 - sum_v q_v

``kl.TopKTeacher`` over other tokens. By the log sum inequality it is a lower bound of any KL that
tells more of that bucket apart. Its sum, too, is divided by all scored tokens.

The sum over a span needs log-probs of several positions before any of them has a gradient. They are
taken first, without one (a matrix product more than ``kd``), and what follows is cross-entropy with
a weight a position, in one pass.

Dimensions: N = scored positions, C = positions of one chunk, V = vocabulary, S = spans. All values
in nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stages.student.losses.kl import TopKTeacher

MOST = -1e-6  # of a student's log q: a span that is certain has no finite divergence


def span_divergences(
    student_S: Tensor, teacher_S: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``tau D`` [S] of log-probs, and its derivative by the student's, both in float64."""
    log_q_S = student_S.double().clamp(max=MOST) / temperature
    log_p_S = teacher_S.double().clamp(max=0.0) / temperature
    p_S, other_p_S = log_p_S.exp(), -torch.expm1(log_p_S)
    other_q_S = -torch.expm1(log_q_S)
    other_S = torch.xlogy(other_p_S, other_p_S) - torch.xlogy(other_p_S, other_q_S)
    values_S = temperature * (p_S * (log_p_S - log_q_S) + other_S)
    return values_S, (other_p_S - other_q_S) / other_q_S


@dataclass(frozen=True, slots=True)
class SpanLikelihoods:
    """``weight`` times the spans' divergences, cross-entropy with the rest, and the entries' KL.

    ``values_N`` has a span's divergence at its last position, ``slopes_N`` at each of its positions
    the derivative by the log-prob of the next token.
    """

    SUMS: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy", "alm", "entries_kl")

    next_token_ids_N: Tensor
    values_N: Tensor
    slopes_N: Tensor
    weight: float
    entries: TopKTeacher | None = None
    entries_weight: float = 0.0

    @property
    def extra_blocks(self) -> int:
        """The softmax, beside the gradient of the entries' KL."""
        return 0 if self.entries is None else 1

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return the sums of ``SUMS``; see ``chunked_loss.PositionLoss``."""
        next_C1 = self.next_token_ids_N[rows, None]
        cross_entropy = -logprobs_CV.gather(1, next_C1).sum()
        divergence = self.values_N[rows].sum().to(cross_entropy)
        kl = torch.zeros_like(cross_entropy)
        softmax_CV = logprobs_CV  # in place, where nothing else is made of it
        if self.entries is not None:
            softmax_CV = logprobs_CV.exp()
            found = self.entries.kl_(logprobs_CV, rows, 1.0 if with_grad else None)
            kl = found.kl_C.sum()
        if with_grad:
            factors_C1 = self.weight * self.slopes_N[rows, None].to(kl) - (1.0 - self.weight)
            if self.entries is None:
                softmax_CV.exp_().mul_(-factors_C1)
            else:
                logprobs_CV.mul_(self.entries_weight).addcmul_(softmax_CV, -factors_C1)
            logprobs_CV.scatter_add_(1, next_C1, factors_C1)
        loss = self.weight * divergence + (1.0 - self.weight) * cross_entropy
        return torch.stack([loss + self.entries_weight * kl, cross_entropy, divergence, kl])


def span_likelihoods(
    batch: Mapping[str, Any],
    logprobs_N: Tensor,
    *,
    temperature: float,
    weight: float,
    entries_weight: float = 0.0,
) -> SpanLikelihoods:
    """Return the loss of a batch of ``SpansCollator``, from the student's log-probs [N]."""
    span_of_N, teacher_S = batch["span_of_N"], batch["span_logprobs_S"]
    sums_S = torch.zeros_like(teacher_S, dtype=torch.float64)
    sums_S.index_add_(0, span_of_N, logprobs_N.double())
    values_S, slopes_S = span_divergences(sums_S, teacher_S, temperature)
    is_last_N = torch.ones_like(span_of_N, dtype=torch.bool)
    is_last_N[:-1] = span_of_N[1:] != span_of_N[:-1]
    values_N = torch.where(is_last_N, values_S[span_of_N], 0.0)
    entries = None
    if entries_weight:
        names = ("token_ids_NK", "probs_NK", "rest_N", "untaught_N")
        entries = TopKTeacher(**{name: batch[name] for name in names})
    spans = batch["next_token_ids_N"], values_N, slopes_S[span_of_N], weight
    return SpanLikelihoods(*spans, entries, entries_weight)
