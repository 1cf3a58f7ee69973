"""Numbers of in-context evaluation, as pure functions of scores, labels and text.

A tie never helps: whatever counts as right has to beat the others, not equal them. A model that
gives every candidate one score is wrong everywhere, and a NaN beside or at the gold is a mistake.

Dimensions: N = candidates or subsets of one episode, Q = queries, M = draws of demonstrations of
one query.
"""

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64Array = npt.NDArray[np.float64]
CandidateScoring = Literal["mean", "sum"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation (n - 1 below the line; None of a single value)."""

    mean: float
    deviation: float | None
    count: int


def mean_and_spread(values: Sequence[float]) -> Spread:
    """Return the spread of one number per draw; raises ValueError without any."""
    if not values:
        raise ValueError("no value to average")
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, len(values))


def candidate_scores(
    logprobs_N: Array, num_tokens_N: Array, scoring: CandidateScoring = "mean"
) -> F64Array:
    """Return [N] scores: the sum of each candidate's log-probs, or the mean over its tokens.

    ``mean`` is MetaICL's (arXiv 2110.15943) and the default; In-context Learning Distillation
    (arXiv 2212.10670) does not say.
    """
    sums_N = np.asarray(logprobs_N, np.float64)
    return sums_N if scoring == "sum" else sums_N / np.asarray(num_tokens_N, np.float64)


def candidate_logprobs(scores_N: Array) -> F64Array:
    """Return [N] log P(candidate): the log-softmax of the scores over an episode's candidates.

    P(c | x, demonstrations) of arXiv 2212.10670, which normalises over the task's label set.
    """
    scores_N = np.asarray(scores_N, np.float64)
    top = scores_N.max()
    shifted_N = scores_N - top
    logprobs_N: F64Array = shifted_N - np.log(np.exp(shifted_N).sum())
    return logprobs_N


def kl_divergence(teacher_logprobs_N: Array, student_logprobs_N: Array) -> float:
    """Return KL(teacher || student) in nats; a candidate the teacher rules out adds nothing."""
    teacher_N, student_N = np.asarray(teacher_logprobs_N), np.asarray(student_logprobs_N)
    possible_N = teacher_N != -np.inf
    teacher_N, student_N = teacher_N[possible_N], student_N[possible_N]
    return float((np.exp(teacher_N) * (teacher_N - student_N)).sum())


def rank_of(scores_N: Array, index: int) -> int:
    """Return the rank of one candidate, 1 the best: ties and NaN go before it.

    rank = 1 + number of other candidates with a score >= its own. ICT's released evaluation counts
    strictly larger scores alone, which puts a model of constant scores at rank 1.
    """
    return int(np.count_nonzero(~(scores_N < scores_N[index])))


def predict(scores_N: Array, gold: int) -> int:
    """Return the best candidate; among equals one that is not ``gold``, so ties are mistakes."""
    if rank_of(scores_N, gold) == 1:
        return gold
    best = int(np.delete(scores_N, gold).argmax())  # a NaN, where there is one
    return best + (best >= gold)


def precision_at(ranks_Q: Sequence[int], k: int) -> float:
    """Return P@k: the share of queries whose gold is among the first k."""
    return float(np.mean([rank <= k for rank in ranks_Q]))


def majority_vote(scores_MN: Array, gold: int) -> int:
    """Return the candidate that most of M draws predict (inference of arXiv 2212.10670).

    Each draw of demonstrations has one vote. Candidates with equal votes are told apart by the sum
    over draws of their probability among the candidates (softmax of a draw's scores); the paper
    names no rule. What is still equal then is decided against ``gold``.
    """
    votes = Counter(predict(scores_N, gold) for scores_N in scores_MN)
    most = max(votes.values())
    tied = sorted(candidate for candidate, count in votes.items() if count == most)
    mass_N = np.exp([candidate_logprobs(scores_N) for scores_N in scores_MN]).sum(axis=0)
    if gold not in tied:
        return max(tied, key=lambda n: mass_N[n])
    return tied[predict(mass_N[tied], tied.index(gold))]


def accuracy(gold_Q: Sequence[Hashable], predicted_Q: Sequence[Hashable]) -> float:
    """Return the share of equal labels."""
    return float(np.mean([g == p for g, p in zip(gold_Q, predicted_Q, strict=True)]))


def macro_f1(gold_Q: Sequence[Hashable], predicted_Q: Sequence[Hashable]) -> float:
    """Return the mean of the labels' F1 over every label that occurs as gold or as prediction.

    As scikit-learn's ``f1_score(average="macro")`` without ``labels``: a label that is predicted
    and never right counts as 0, one that never occurs is left out.
    """
    right = Counter(g for g, p in zip(gold_Q, predicted_Q, strict=True) if g == p)
    seen = Counter(gold_Q) + Counter(predicted_Q)  # 2 TP + FP + FN of each label
    return float(np.mean([2 * right[label] / count for label, count in seen.items()]))


def majority_baseline(gold_Q: Sequence[Hashable]) -> tuple[float, float]:
    """Return accuracy and macro-F1 of always answering the commonest gold label of these queries.

    The best constant answer in hindsight: a majority label taken from training data does no better.
    """
    label, count = Counter(gold_Q).most_common(1)[0]
    return count / len(gold_Q), macro_f1(gold_Q, [label] * len(gold_Q))


def random_precision(num_candidates_Q: Sequence[int], k: int = 1) -> float:
    """Return the expected P@k of uniformly random answers; for k = 1 their accuracy."""
    return float(np.mean([min(k, count) / count for count in num_candidates_Q]))


def best_and_worst_agree(
    teacher_ranks_N: Array, student_scores_N: Array
) -> tuple[bool | None, bool | None]:
    """Return whether teacher and student agree on the best, and on the worst, of N subsets.

    BiAlign's consistency (arXiv 2312.17055): the share of episodes where they do.
    ``teacher_ranks_N`` has 1 for the best and equal ranks for ties. None where the teacher's own
    best (worst) is tied: nothing to agree with, so count such an episode out. The paper does not
    mention ties. A tie of the student is a disagreement.
    """
    ranks_N = np.asarray(teacher_ranks_N)
    scores_N = np.asarray(student_scores_N, np.float64)
    (best,), (worst,) = np.where(ranks_N == ranks_N.min()), np.where(ranks_N == ranks_N.max())
    return (
        rank_of(scores_N, best[0]) == 1 if len(best) == 1 else None,
        rank_of(-scores_N, worst[0]) == 1 if len(worst) == 1 else None,
    )


def kendall_tau_b(a_N: Array, b_N: Array) -> float | None:
    """Return the rank correlation of two orders, in -1 to 1; None if one of them is all ties.

    tau_b = (concordant - discordant) / sqrt(pairs untied in a * pairs untied in b) (Kendall 1945,
    doi:10.1093/biomet/33.3.239). O(N^2), for the few subsets of an episode.
    """
    a_N, b_N = np.asarray(a_N, np.float64), np.asarray(b_N, np.float64)
    upper = np.triu_indices(len(a_N), k=1)
    a_pairs = np.sign(a_N[:, None] - a_N)[upper]
    b_pairs = np.sign(b_N[:, None] - b_N)[upper]
    untied = np.count_nonzero(a_pairs) * np.count_nonzero(b_pairs)
    return float((a_pairs * b_pairs).sum() / np.sqrt(untied)) if untied else None


def normalise_answer(text: str) -> str:
    """Lower the case, take out ASCII punctuation, the articles a, an, the, and extra spaces.

    The normalisation of SQuAD's evaluation (arXiv 1606.05250, section 6.1).
    """
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(gold: str, predicted: str) -> bool:
    """Return whether two answers are equal once normalised."""
    return normalise_answer(gold) == normalise_answer(predicted)


def token_f1(gold: str, predicted: str) -> float:
    """Return the F1 of the normalised answers' words, taken as bags (arXiv 1606.05250, 6.1).

    Two answers of no words at all agree: 1. One of them empty: 0.
    """
    gold_words, words = normalise_answer(gold).split(), normalise_answer(predicted).split()
    if not gold_words or not words:
        return float(gold_words == words)
    common = (Counter(gold_words) & Counter(words)).total()
    return 2 * common / (len(gold_words) + len(words))
