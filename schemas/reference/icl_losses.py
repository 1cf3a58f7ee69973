"""Losses over few-shot episodes: BiAlign's two terms, and In-context Learning Distillation's.

Log-probs of answers are the student's sums of log p over an answer's tokens; ranks, scores and
lengths are columns of ``subset_preferences`` and ``candidate_scores``. Float64 throughout.

Dimensions: N = subsets or candidates of an episode, B = episodes, P = scored positions. All values
in nats.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .token_losses import F64Array, kd, log_softmax

Array = npt.NDArray[Any]
MIN_RANGE = 1e-3  # nats; see ranking_loss


def ranking_loss(logprobs_N: Array, ranks_N: Array) -> float:
    """Return BiAlign's ranking loss of one episode (arXiv 2312.17055), ranks 1 the best.

    The sum over pairs of which the teacher ranks R+ before R- of ``max(0, (log Q(R-) - log Q(R+)) /
    (max log Q - min log Q) + (rank(R-) - rank(R+)) / (N - 1))``; the range is at least
    ``MIN_RANGE``, and carries no gradient where one is taken.
    """
    student_N, ranks_N = np.asarray(logprobs_N, np.float64), np.asarray(ranks_N, np.int64)
    spread = max(float(student_N.max() - student_N.min()), MIN_RANGE)
    total = 0.0
    for better, best_rank in enumerate(ranks_N):
        for worse, rank in enumerate(ranks_N):
            if rank > best_rank:
                ahead = (student_N[worse] - student_N[better]) / spread
                total += max(0.0, float(ahead + (rank - best_rank) / (len(ranks_N) - 1)))
    return total


def bialign(
    kl_P: Array,
    ranking_B: Sequence[float],
    rank_weight: float = 0.05,
    kl_reduction: Literal["sum", "mean"] = "sum",
) -> float:
    """Return ``L_KL + rank_weight L_rank`` of a step.

    The KL of all positions of its episodes is summed and averaged over episodes (``sum``, the
    paper's), or averaged over positions; the ranking loss is averaged over episodes.
    """
    kl = float(np.mean(kl_P)) if kl_reduction == "mean" else float(np.sum(kl_P)) / len(ranking_B)
    return kl + rank_weight * float(np.mean(ranking_B))


def candidate_logprobs(
    logprobs_N: Array, num_tokens_N: Array, candidate_score: Literal["mean", "sum"] = "mean"
) -> F64Array:
    """Return log P(c) [N]: the log-softmax of the candidates' log-probs, per token or summed."""
    scores_N = np.asarray(logprobs_N, np.float64)
    return log_softmax(scores_N / num_tokens_N if candidate_score == "mean" else scores_N)


def icl_distillation(
    logprobs_N: Array,
    num_tokens_N: Array,
    gold: int,
    teacher_logprobs_N: Array,
    alpha: float,
    candidate_score: Literal["mean", "sum"] = "mean",
) -> float:
    """Return ``alpha hard_icl + (1 - alpha) soft_icl`` of one episode (arXiv 2212.10670).

    ``hard_icl`` is ``-log P(gold)`` and ``soft_icl`` the cross-entropy to the teacher's P. Without
    candidates (``gold`` -1) there is the mean of the answer's ``-log p`` a token, and nothing soft.
    """
    if gold < 0:
        return -alpha * float((np.asarray(logprobs_N, np.float64) / num_tokens_N).sum())
    student_N = candidate_logprobs(logprobs_N, num_tokens_N, candidate_score)
    teacher_N = candidate_logprobs(teacher_logprobs_N, num_tokens_N, candidate_score)
    soft = -float((np.exp(teacher_N) * student_N).sum())
    return -alpha * float(student_N[gold]) + (1.0 - alpha) * soft


def icl_text(kl_P: Array, cross_entropy_P: Array, entropies_P: Array, alpha: float) -> F64Array:
    """Return ``alpha hard_lm + (1 - alpha) soft_lm`` [P], to be weighted by ``lm_weight``.

    ``soft_lm`` is the cross-entropy to the teacher's distribution: KL plus its entropy.
    """
    mixed_P = kd(kl_P, cross_entropy_P, 1.0 - alpha)
    return mixed_P + (1.0 - alpha) * np.asarray(entropies_P, np.float64)
