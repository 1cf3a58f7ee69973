"""Several teachers of one student: of one position together, or each of its own data set.

With weights ``w_t``, positive and of sum one, and teachers p_t (padding dropped of each by itself,
as ``losses.kl`` says):

``arithmetic``: the mixture is ``p = sum_t w_t p_t``. What is computed and logged as ``kl`` is
``sum_t w_t KL(p_t || s)``. It is ``KL(p || s)`` plus the generalised Jensen-Shannon divergence of
the teachers, ``H(p) - sum_t w_t H(p_t)`` (Lin 1991, IEEE Trans. Inf. Theory 37(1), section IV),
which the student has no part in: the gradient is that of ``KL(p || s)`` exactly. Each term is what
its encoding makes of it, so sampled encodings stay unbiased, and ``top_k`` a lower bound.

``geometric``: ``log p = sum_t w_t log p_t - log Z``, the normalised product (the logarithmic
opinion pool; Hinton 2002, doi 10.1162/089976602760128018), over the tokens that every teacher has.
The loss is ``KL(p || s)`` itself. It needs ``log p_t`` of every token: a sample has none for an
entry that it lacks, so ``exact`` alone allows it.

Dimensions: N = scored positions, C = positions of one chunk, V = vocabulary of the student, U <= V
= ids that tokens use and every teacher has. All values in nats.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stages.models.causal_lm.chunked_loss import PositionLoss
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.losses.kl import Divergence, ExactTeacher, Teacher, Told, teacher_of

Kind = Literal["arithmetic", "geometric"]


@dataclass(frozen=True, slots=True)
class ArithmeticTeachers:
    """``sum_t w_t KL(p_t || s)``; the gradient of a teacher is affine in what it is mixed with."""

    EXTRA_BLOCKS: ClassVar[int] = 4  # a copy of the log-probs, the sum, and what ``exact`` makes

    teachers: tuple[Teacher, ...]
    weights: tuple[float, ...]

    def kl_(self, logprobs_CV: Tensor, rows: slice, weight: float | None) -> Divergence:
        """Return the weighted mean of the KLs, and of what each dropped."""
        kl_C, dropped_C = logprobs_CV.new_zeros((2, len(logprobs_CV)))
        summed_CV: Tensor | None = None
        for place, (teacher, share) in enumerate(zip(self.teachers, self.weights, strict=True)):
            is_last = place == len(self.teachers) - 1
            own_CV = logprobs_CV if is_last else logprobs_CV.clone()
            found = teacher.kl_(own_CV, rows, weight)
            kl_C = kl_C + share * found.kl_C
            dropped_C = dropped_C + share * found.dropped_C
            if weight is None:
                continue
            own_CV.mul_(share)
            summed_CV = own_CV if summed_CV is None else own_CV.add_(summed_CV)
        return Divergence(kl_C, dropped_C)

    def top_token_ids(self, rows: slice) -> Tensor:
        """The token that is likeliest to every teacher, and so to the mixture; -1 without one."""
        first_C, *others = (teacher.top_token_ids(rows) for teacher in self.teachers)
        for other_C in others:
            first_C = torch.where(first_C == other_C, first_C, -1)
        return first_C


@dataclass(frozen=True, slots=True)
class GeometricTeachers:
    """The normalised product of whole distributions; its KL and gradient ``s - p``."""

    EXTRA_BLOCKS: ClassVar[int] = 4  # the product, one teacher's log-probs and what those need

    teachers: tuple[ExactTeacher, ...]
    weights: tuple[float, ...]

    def kl_(self, logprobs_CV: Tensor, rows: slice, weight: float | None) -> Divergence:
        """Return the KL; tokens that one teacher lacks have probability 0."""
        told = self._told(rows, logprobs_CV.dtype)
        probs_CU = told.logprobs_CU.exp()
        known_CU = logprobs_CV[:, : probs_CU.shape[1]]
        kl_C: Tensor = torch.linalg.vecdot(probs_CU, told.logprobs_CU.sub_(known_CU))
        if weight is not None:
            logprobs_CV.exp_()
            known_CU.sub_(probs_CU, alpha=weight)
        return Divergence(kl_C, told.dropped_C)

    def top_token_ids(self, rows: slice) -> Tensor:
        """The likeliest token of the product."""
        return self._told(rows, torch.float32).logprobs_CU.argmax(dim=1)

    def _told(self, rows: slice, dtype: torch.dtype) -> Told:
        """Return log p [C, U], and the weighted mean of what the teachers dropped."""
        first, *others = zip(self.teachers, self.weights, strict=True)
        found = first[0].logprobs(rows, 1.0, dtype)
        mixed_CU, dropped_C = found.logprobs_CU.mul_(first[1]), first[1] * found.dropped_C
        for teacher, share in others:
            found = teacher.logprobs(rows, 1.0, dtype)
            num_ids = min(mixed_CU.shape[1], found.logprobs_CU.shape[1])
            mixed_CU = mixed_CU[:, :num_ids].add_(found.logprobs_CU[:, :num_ids], alpha=share)
            dropped_C = dropped_C + share * found.dropped_C
        return Told(mixed_CU.sub_(mixed_CU.logsumexp(dim=1, keepdim=True)), dropped_C)


def mixed(teachers: Sequence[Teacher], kind: Kind, weights: Sequence[float]) -> Teacher:
    """Return the mixture of teachers as one; ``weights`` are divided by their sum."""
    shares = tuple(weight / sum(weights) for weight in weights)
    if kind == "arithmetic":
        return ArithmeticTeachers(tuple(teachers), shares)
    whole = tuple(teacher for teacher in teachers if isinstance(teacher, ExactTeacher))
    assert len(whole) == len(teachers), "another encoding is refused"
    return GeometricTeachers(whole, shares)


def taught_by(
    columns: Mapping[str, Any], heads: Mapping[int, LanguageHead], mixture: Any
) -> Teacher:
    """Return the teacher of an entry of ``taught`` of a batch (``batches.teachers``).

    ``heads`` are those of ``exact`` tables, by their place in the data; ``mixture`` has the kind
    and the weights of several.
    """
    found = [teacher_of(told, heads.get(told["table"])) for told in columns["teachers"]]
    return found[0] if len(found) == 1 else mixed(found, mixture.kind, mixture.weights)


def next_logprobs_of(columns: Mapping[str, Any], mixture: Any) -> Tensor:
    """Return [N] log p of the next tokens by the mixture; NaN of a geometric one, whose Z is not
    stored.
    """
    told_TN = torch.stack([told["teacher_next_logprobs_N"] for told in columns["teachers"]])
    if len(told_TN) == 1:
        return told_TN[0]
    if mixture.kind == "geometric":
        return torch.full_like(told_TN[0], float("nan"))
    weights_T = torch.tensor(mixture.weights, dtype=told_TN.dtype, device=told_TN.device)
    return torch.logsumexp(told_TN + (weights_T / weights_T.sum()).log()[:, None], dim=0)


@dataclass(frozen=True, slots=True)
class EachItsOwn:
    """A loss whose positions up to each of ``stops`` are those of its own loss, which counts them
    from 0; all have the same sums.
    """

    losses: tuple[PositionLoss, ...]
    stops: tuple[int, ...]

    @property
    def SUMS(self) -> tuple[str, ...]:
        """Those of each."""
        return self.losses[0].SUMS

    @property
    def extra_blocks(self) -> int:
        """The most that one makes."""
        return max(loss.extra_blocks for loss in self.losses)

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return the sums over all; see ``chunked_loss.PositionLoss``."""
        found, start = [], 0
        for loss, stop in zip(self.losses, self.stops, strict=True):
            first, last = max(rows.start, start), min(rows.start + len(logprobs_CV), stop)
            if first < last:
                own_CV = logprobs_CV[first - rows.start : last - rows.start]
                own = slice(first - start, last - start)
                found.append(loss.reduce_(own_CV, own, with_grad=with_grad))
            start = stop
        return torch.stack(found).sum(dim=0)


def of_each(
    batch: Mapping[str, Any], loss_of: Callable[[Mapping[str, Any], Tensor], PositionLoss]
) -> EachItsOwn:
    """Return the loss of a batch that is ``taught``: ``loss_of`` each entry and its next tokens."""
    stops = tuple(columns["stop"] for columns in batch["taught"])
    starts = (0, *stops[:-1])
    next_N = batch["next_token_ids_N"]
    pieces = zip(batch["taught"], starts, stops, strict=True)
    losses = tuple(loss_of(columns, next_N[start:stop]) for columns, start, stop in pieces)
    return EachItsOwn(losses, stops)
