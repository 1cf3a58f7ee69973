"""Divergences by choice between the student and an ``exact`` teacher, at a temperature.

q is the teacher's distribution over the n ids that tokens use (``losses.kl``), s the student's over
all of its rows, both the softmax of logits over the temperature T. With m a mixture of the two, by
value and by gradient with respect to the student's logits over T:

``forward_kl``: ``sum q log(q / s)``; ``s - q``.

``reverse_kl``: ``sum s log(s / q)``, what MiniLLM minimises (arXiv 2306.08543, equation 1), here
token by token under the cached context; ``s (log(s / q) - D)``.

``skewed_kl``: ``sum q log(q / m)``, ``m = alpha q + (1 - alpha) s`` (DistiLLM, arXiv 2402.03898,
section 3.1); with ``r = q (1 - alpha) s / m``, ``s sum(r) - r``.

``skewed_reverse_kl``: ``sum s log(s / m)``, ``m = (1 - alpha) q + alpha s`` (the same section);
with ``h = log(s / m) - alpha s / m``, ``s (h - sum(s h))``.

``jensen_shannon``: ``beta sum q log(q / m) + (1 - beta) sum s log(s / m)``, ``m = beta q +
(1 - beta) s`` (JSD(beta) of GKD, arXiv 2306.13649, section 2); with R the second sum,
``(1 - beta) s (log(s / m) - R)``.

``total_variation``: ``sum |q - s| / 2``, a number from 0 to 1; with g the sign of ``s - q`` (0
where they are equal), ``s (g - sum(s g)) / 2``.

Mixtures are taken in log space, so that a probability that float32 cannot hold still counts.

**Temperature.** The loss is the divergence times T squared, as Hinton et al. 2015 (arXiv
1503.02531, section 2) weigh their soft targets: gradients fall with the square of T, and keep their
size beside cross-entropy. Those of total variation fall with T itself, which is its factor.
Cross-entropy is at temperature 1.

**Padding.** q is 0 on ids from n on, where ``log(s / q)`` is infinite. ``reverse_kl`` is therefore
taken between q and what the student gives tokens, s over its sum S, plus ``-log S``: the same term
that is in the forward KL to a q without padding, so a student's padding is pushed down as there.
The others stand as they are: a mixture holds s on padding too, and total variation is finite.

Dimensions: N = scored positions, C = positions of one chunk, V = vocabulary of the student, U <= V
= ids of the teacher that tokens use.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stages.student.losses.cross_entropy import add_one_hot_, weigh_gradient_, weighted
from stages.student.losses.kl import ExactTeacher

# The student's log-probs [C, V] and the teacher's [C, U], both overwritten, and whether the former
# are to become the gradient; returns the divergence [C].
Measure = Callable[[Tensor, Tensor, bool], Tensor]


def forward_kl_(student_CV: Tensor, teacher_CU: Tensor, with_grad: bool) -> Tensor:
    """See above."""
    known_CU, _ = _parts(student_CV, teacher_CU)
    probs_CU = teacher_CU.exp()
    kl_C: Tensor = torch.linalg.vecdot(probs_CU, teacher_CU.sub_(known_CU))
    if with_grad:
        student_CV.exp_()
        known_CU.sub_(probs_CU)
    return kl_C


def reverse_kl_(student_CV: Tensor, teacher_CU: Tensor, with_grad: bool) -> Tensor:
    """See above; without padding the student's mass on tokens is 1 and its log 0."""
    known_CU, padding = _parts(student_CV, teacher_CU)
    log_mass_C = (
        known_CU.logsumexp(dim=1) if padding.shape[1] else known_CU.new_zeros(len(known_CU))
    )
    log_ratio_CU = teacher_CU.neg_().add_(known_CU).sub_(log_mass_C[:, None])
    shares_CU = (known_CU - log_mass_C[:, None]).exp_()
    kl_C: Tensor = torch.linalg.vecdot(shares_CU, log_ratio_CU)
    if with_grad:
        padding.exp_()
        log_ratio_CU.sub_((kl_C - torch.expm1(log_mass_C))[:, None])
        known_CU.copy_(shares_CU.mul_(log_ratio_CU))
    return kl_C - log_mass_C


def skewed_kl_(student_CV: Tensor, teacher_CU: Tensor, with_grad: bool, *, alpha: float) -> Tensor:
    """See above."""
    known_CU, _ = _parts(student_CV, teacher_CU)
    mixed_CU = _mixed(teacher_CU, known_CU, alpha)
    probs_CU = teacher_CU.exp()
    kl_C: Tensor = torch.linalg.vecdot(probs_CU, teacher_CU.sub_(mixed_CU))
    if with_grad:
        of_student_CU = torch.sub(known_CU, mixed_CU, out=mixed_CU).exp_().mul_(1.0 - alpha)
        probs_CU.mul_(of_student_CU)
        student_CV.exp_().mul_(probs_CU.sum(dim=1, keepdim=True))
        known_CU.sub_(probs_CU)
    return kl_C


def skewed_reverse_kl_(
    student_CV: Tensor, teacher_CU: Tensor, with_grad: bool, *, alpha: float
) -> Tensor:
    """See above; on padding s / m is 1 / alpha."""
    known_CU, padding = _parts(student_CV, teacher_CU)
    mixed_CU = _mixed(teacher_CU, known_CU, 1.0 - alpha)
    log_ratio_CU = torch.sub(known_CU, mixed_CU, out=mixed_CU)
    student_CV.exp_()
    unused_C = padding.sum(dim=1)
    kl_C: Tensor = torch.linalg.vecdot(known_CU, log_ratio_CU) - math.log(alpha) * unused_C
    if with_grad:
        log_ratio_CU.sub_(torch.exp(log_ratio_CU, out=teacher_CU).mul_(alpha))
        _centre_(student_CV, log_ratio_CU, -math.log(alpha) - 1.0, unused_C)
    return kl_C


def jensen_shannon_(
    student_CV: Tensor, teacher_CU: Tensor, with_grad: bool, *, beta: float
) -> Tensor:
    """See above; on padding s / m is 1 / (1 - beta)."""
    known_CU, padding = _parts(student_CV, teacher_CU)
    mixed_CU = _mixed(teacher_CU, known_CU, beta)
    probs_CU = teacher_CU.exp()
    of_teacher_C = torch.linalg.vecdot(probs_CU, teacher_CU.sub_(mixed_CU))
    log_ratio_CU = torch.sub(known_CU, mixed_CU, out=mixed_CU)
    student_CV.exp_()
    on_padding, unused_C = -math.log1p(-beta), padding.sum(dim=1)
    of_student_C = torch.linalg.vecdot(known_CU, log_ratio_CU) + on_padding * unused_C
    if with_grad:
        _centre_(student_CV, log_ratio_CU, on_padding, unused_C)
        student_CV.mul_(1.0 - beta)
    found_C: Tensor = beta * of_teacher_C + (1.0 - beta) * of_student_C
    return found_C


def total_variation_(student_CV: Tensor, teacher_CU: Tensor, with_grad: bool) -> Tensor:
    """See above."""
    known_CU, padding = _parts(student_CV, teacher_CU)
    student_CV.exp_()
    unused_C = padding.sum(dim=1)
    over_CU = teacher_CU.exp_().neg_().add_(known_CU)
    distance_C: Tensor = torch.linalg.vector_norm(over_CU, ord=1, dim=1) + unused_C
    if with_grad:
        _centre_(student_CV, over_CU.sign_(), 1.0, unused_C)
        student_CV.mul_(0.5)
    return 0.5 * distance_C


def _parts(student_CV: Tensor, teacher_CU: Tensor) -> tuple[Tensor, Tensor]:
    """Return the student's columns of tokens that the teacher has, and the others: views."""
    num_ids = teacher_CU.shape[1]
    return student_CV[:, :num_ids], student_CV[:, num_ids:]


def _mixed(teacher_CU: Tensor, student_CU: Tensor, share: float) -> Tensor:
    """Return ``log(share q + (1 - share) s)``, in one new block."""
    odds = math.log(share) - math.log1p(-share)
    mixed_CU = teacher_CU + odds
    return torch.logaddexp(mixed_CU, student_CU, out=mixed_CU).add_(math.log1p(-share))


def _centre_(probs_CV: Tensor, slopes_CU: Tensor, on_padding: float, unused_C: Tensor) -> None:
    """Replace s by ``s (g - sum(s g))``; g is ``slopes_CU``, ``on_padding`` on other ids."""
    known_CU, padding = _parts(probs_CV, slopes_CU)
    mean_C = torch.linalg.vecdot(known_CU, slopes_CU) + on_padding * unused_C
    known_CU.mul_(slopes_CU.sub_(mean_C[:, None]))
    padding.mul_(on_padding - mean_C[:, None])


# Each kind, and the power of T that its gradient falls with.
MEASURES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "forward_kl": (forward_kl_, 2),
    "reverse_kl": (reverse_kl_, 2),
    "skewed_kl": (skewed_kl_, 2),
    "skewed_reverse_kl": (skewed_reverse_kl_, 2),
    "jensen_shannon": (jensen_shannon_, 2),
    "total_variation": (total_variation_, 1),
}


@dataclass(frozen=True, slots=True)
class KdByDivergence:
    """``weight T^power D + (1 - weight) CE`` over all scored positions of a batch.

    The log's ``divergence`` is D itself, without the factor. With ``weights_N`` a position's losses
    and gradient are multiplied by its own weight.
    """

    SUMS: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy", "divergence", "dropped_mass")

    next_token_ids_N: Tensor
    teacher: ExactTeacher
    weight: float
    measure: Measure
    temperature: float = 1.0
    power: int = 2
    weights_N: Tensor | None = None

    @property
    def extra_blocks(self) -> int:
        """The teacher's log-probs, two of a measure, and what cross-entropy's gradient needs."""
        return 3 + (self.weight < 1.0)

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return the sums of ``SUMS``; see ``chunked_loss.PositionLoss``."""
        next_C1 = self.next_token_ids_N[rows, None]
        next_C = logprobs_CV.gather(1, next_C1)[:, 0]
        cross_entropy = -weighted(next_C, self.weights_N, rows).sum()
        softmax_CV = logprobs_CV.exp() if with_grad and self.weight < 1.0 else None
        if self.temperature != 1.0:
            logprobs_CV.div_(self.temperature)
            logprobs_CV.sub_(logprobs_CV.logsumexp(dim=1, keepdim=True))
        told = self.teacher.logprobs(rows, self.temperature, logprobs_CV.dtype)
        found_C = self.measure(logprobs_CV, told.logprobs_CU, with_grad)
        if with_grad:
            logprobs_CV.mul_(self.weight * self.temperature ** (self.power - 1))
            if softmax_CV is not None:
                add_one_hot_(softmax_CV, next_C1, -1.0)
                logprobs_CV.add_(softmax_CV, alpha=1.0 - self.weight)
            weigh_gradient_(logprobs_CV, self.weights_N, rows)
        divergence = weighted(found_C, self.weights_N, rows).sum()
        dropped = weighted(told.dropped_C, self.weights_N, rows).sum()
        loss = self.weight * self.temperature**self.power * divergence
        loss = loss + (1.0 - self.weight) * cross_entropy
        return torch.stack([loss, cross_entropy, divergence, dropped.to(loss)])
