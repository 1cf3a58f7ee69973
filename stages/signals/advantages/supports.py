"""Which tokens' advantages are kept at a position: torch, batched, CPU or GPU.

What each support is for is in ``schemas.tables.prompted.advantages``. All of them read the
log-probs of both models over the whole vocabulary, in float32; no step loops over positions.

``threshold`` draws with the scheme of ``stages.signals.scoring.encoding``: a token of weight w is
kept with probability ``min(1, w / tau)``. What a token adds to the sum of an objective is ``pi A``
with pi a student of a later day, so w is ``m |A|`` with m the mean of aligned teacher, reference
and student. Of the student only its likeliest tokens are known. What it gives to the others is
shared out among them as the square root of the teachers' mean, which is flatter: a student is less
sure than its teacher, and a token that it likes and m does not is rare and counts for thousands
when it comes. Neither guess biases anything. Every token has a weight above 0, so what is divided
by the probability of being drawn is unbiased for any student. On 384 positions (SmolLM2-135M, k =
16) the expected error of a position's gradient was 7.1 times the gradient with the student's known
tokens alone in m, 1.8 with the others shared out, 1.2 with ``|A|`` too (November 2026).

Dimensions: P = positions, V = vocabulary, K = kept entries, S = likeliest tokens known of the
student, U = likeliest tokens of all three, E = kept entries of all positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.signals.scoring.encoding import measure, threshold_sample

RELEASED_FLOOR = 1e-7  # of the published code, in the place of a missing reference probability
_LEAST_ADVANTAGE = 1e-4  # nats, before beta: where models agree, weights are m
_TINY = 1e-30  # for a vocabulary of which all is known


@dataclass(frozen=True, slots=True)
class Scored:
    """Both models' log-probs [P, V] at the same positions, and the tokens that were generated."""

    aligned_PV: Tensor
    reference_PV: Tensor
    token_ids_P: Tensor
    beta: float

    @property
    def is_finite(self) -> bool:
        """Whether every position has a distribution: a log-softmax is nan in all tokens or none."""
        nan_P = torch.isnan(self.aligned_PV[:, 0]) | torch.isnan(self.reference_PV[:, 0])
        return not bool(nan_P.any())

    def advantages(self) -> Tensor:
        """Return ``beta (log p_aligned - log p_reference)`` [P, V]."""
        return (self.aligned_PV - self.reference_PV).mul_(self.beta)

    def of_generated(self, logprobs_PV: Tensor) -> Tensor:
        """Return the entries [P] of the tokens that were generated."""
        return logprobs_PV.gather(1, self.token_ids_P[:, None])[:, 0]


@dataclass(frozen=True, slots=True)
class StudentTop:
    """The student's likeliest tokens, by falling probability, and its log-probs of them.

    A token that the teachers do not have is no part of any support: there is no advantage of it.
    """

    token_ids_PS: Tensor
    logprobs_PS: Tensor


@dataclass(frozen=True, slots=True)
class ThresholdKept:
    """K drawn tokens a position and the log of the probability with which each was drawn."""

    token_ids_PK: Tensor
    advantages_PK: Tensor
    log_inclusions_PK: Tensor


@dataclass(frozen=True, slots=True)
class UnionKept:
    """The tokens of all positions end to end, by rising id, and what all others are as one."""

    num_entries_P: Tensor
    token_ids_E: Tensor
    advantages_E: Tensor
    rest_advantages_P: Tensor


@dataclass(frozen=True, slots=True)
class ReleasedKept:
    """The aligned teacher's likeliest tokens, by falling probability."""

    token_ids_PK: Tensor
    advantages_PK: Tensor


def threshold_support(
    scored: Scored, student: StudentTop, offsets_P: Tensor, *, k: int
) -> ThresholdKept:
    """Draw ``k`` tokens a position; ``offsets_P`` in [0, 1) is the one uniform of the draw."""
    advantages_PV = scored.advantages()
    weights_PV = drawing_weights(scored, student)
    sample = threshold_sample(measure(weights_PV.log(), scored.token_ids_P), offsets_P, k=k)
    ids_PK = sample.token_ids_PK
    is_sure_PK = torch.arange(k, device=ids_PK.device) < sample.num_head_P[:, None]
    kept_PK = weights_PV.gather(1, ids_PK)
    tail_PV = weights_PV.scatter_(1, ids_PK, kept_PK.masked_fill(is_sure_PK, 0.0))
    tau_P = tail_PV.sum(dim=1, dtype=torch.float64) / (k - sample.num_head_P)
    log_inclusions_PK = (kept_PK / tau_P[:, None]).log().float().clamp_(max=0.0)
    return ThresholdKept(
        token_ids_PK=ids_PK,
        advantages_PK=advantages_PV.gather(1, ids_PK),
        log_inclusions_PK=log_inclusions_PK.masked_fill(is_sure_PK, 0.0),
    )


def drawing_weights(scored: Scored, student: StudentTop) -> Tensor:
    """Return the weights [P, V] that ``threshold`` with k draws by."""
    weights_PV, _ = mean_distribution(scored, student)
    weights_PV *= scored.advantages().abs().clamp_(min=_LEAST_ADVANTAGE * scored.beta)
    return weights_PV


def mean_distribution(scored: Scored, student: StudentTop) -> tuple[Tensor, Tensor]:
    """Return the mean of the three distributions [P, V], and the guess that completes the student.

    The guess [P, V] holds what the student gives to the tokens of which it is not known.
    """
    known_PS = student.token_ids_PS < scored.aligned_PV.shape[1]
    ids_PS = student.token_ids_PS * known_PS
    mass_PS = torch.where(known_PS, student.logprobs_PS.exp(), 0.0)
    sum_PV = scored.aligned_PV.exp().add_(scored.reference_PV.exp())
    guess_PV = sum_PV.sqrt().scatter_(1, ids_PS, 0.0)
    unknown_P1 = (1.0 - mass_PS.sum(dim=1, keepdim=True)).clamp(min=0.0)
    guess_PV *= unknown_P1 / guess_PV.sum(dim=1, keepdim=True).clamp(min=_TINY)
    sum_PV.add_(guess_PV).scatter_add_(1, ids_PS, mass_PS)
    return sum_PV.div_(3.0), guess_PV


def union_support(scored: Scored, student: StudentTop, *, k: int) -> UnionKept:
    """Keep the ``k`` likeliest tokens of each model, once each.

    What is left over is summed over the rest itself: one minus what is kept would lose it to
    rounding. Where nothing is left over, its advantage is 0 and nobody's.
    """
    likeliest_PK = scored.aligned_PV.topk(k, dim=1).indices
    student_PK = student.token_ids_PS[:, :k]
    in_reach_PK = student_PK < scored.aligned_PV.shape[1]
    ids_PU, _ = torch.cat(
        [
            likeliest_PK,
            scored.reference_PV.topk(k, dim=1).indices,
            torch.where(in_reach_PK, student_PK, likeliest_PK[:, :1]),
        ],
        dim=1,
    ).sort(dim=1)
    is_new_PU = torch.ones_like(ids_PU, dtype=torch.bool)
    is_new_PU[:, 1:] = ids_PU[:, 1:] != ids_PU[:, :-1]
    num_entries_P = is_new_PU.sum(1)
    rest_aligned_P, rest_reference_P = (
        logprobs_PV.scatter(1, ids_PU, -torch.inf).logsumexp(dim=1)
        for logprobs_PV in (scored.aligned_PV, scored.reference_PV)
    )
    none_left_P = num_entries_P == scored.aligned_PV.shape[1]
    rest_P = (rest_aligned_P - rest_reference_P).mul_(scored.beta)
    return UnionKept(
        num_entries_P=num_entries_P,
        token_ids_E=ids_PU[is_new_PU],
        advantages_E=scored.advantages().gather(1, ids_PU)[is_new_PU],
        rest_advantages_P=rest_P.masked_fill(none_left_P, 0.0),
    )


def released_support(scored: Scored, *, k: int) -> ReleasedKept:
    """Keep the aligned teacher's ``k`` likeliest tokens with the published code's log-ratios.

    A token outside the reference's own ``k`` likeliest is given, as its reference probability, the
    smallest aligned probability that is kept. Nothing is clipped here: the published loss does
    that. Softmax is float32, where the published code has float16.
    """
    aligned_PK, ids_PK = scored.aligned_PV.topk(k, dim=1)
    reference_ids_PK = scored.reference_PV.topk(k, dim=1).indices
    is_missing_PK = (ids_PK[:, :, None] != reference_ids_PK[:, None, :]).all(dim=2)
    floor_P1 = aligned_PK[:, -1:].exp().clamp(min=RELEASED_FLOOR).log()
    reference_PK = scored.reference_PV.gather(1, ids_PK)
    return ReleasedKept(ids_PK, aligned_PK - torch.where(is_missing_PK, floor_P1, reference_PK))
