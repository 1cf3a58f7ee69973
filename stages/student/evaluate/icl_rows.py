"""What a student came to on each single episode: the rows behind the numbers of ``icl_tasks``.

Two students are compared by pairs of these: a difference is then not blurred by how hard the
episodes are. Dimensions: N = candidates or subsets of an episode.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.student.evaluate.free_answers import FreeAnswer
from stages.student.evaluate.icl_metrics import (
    best_and_worst_agree,
    candidate_logprobs,
    exact_match,
    kendall_tau_b,
    kl_divergence,
    rank_of,
    token_f1,
)
from stages.student.evaluate.icl_tasks import STUDENT, TEACHER, Choice

Array = npt.NDArray[Any]
Row = Mapping[str, Any]
EpisodeRow = dict[str, Any]


def episode_row(
    row: Row,
    choice: Choice | None = None,
    answer: FreeAnswer | None = None,
    subset_scores_N: Array | None = None,
) -> EpisodeRow:
    """Return one episode's results as plain JSON values, beside the names it is paired by.

    ``right`` and ``teacher_right`` say whether the gold candidate beats all others,
    ``gold_logprob`` is log P(gold) over the candidates and ``candidate_kl`` as in ``icl_tasks``, in
    nats; ``exact_match`` and ``token_f1`` are of a free answer; ``subset_rank_correlation``,
    ``best_subset_agreement`` and ``worst_subset_agreement`` are None where ties leave nothing to
    agree with.
    """
    found: EpisodeRow = {name: row[name] for name in ("sample_id", "task", "query_id")}
    found["draw"] = int(row["draw"])
    if choice is not None:
        found |= _of_choice(choice)
    if answer is not None:
        found["exact_match"] = exact_match(answer.gold, answer.predicted)
        found["token_f1"] = token_f1(answer.gold, answer.predicted)
    if subset_scores_N is not None:
        ranks_N = row["ranks_N"]
        best, worst = best_and_worst_agree(ranks_N, subset_scores_N)
        found["best_subset_agreement"], found["worst_subset_agreement"] = best, worst
        tau = kendall_tau_b(-ranks_N.astype(np.int64), subset_scores_N)
        found["subset_rank_correlation"] = tau
    return found


def _of_choice(choice: Choice) -> EpisodeRow:
    student_N = candidate_logprobs(choice.scores[STUDENT])
    found: EpisodeRow = {
        "right": rank_of(student_N, choice.gold) == 1,
        "gold_logprob": float(student_N[choice.gold]),
    }
    if TEACHER in choice.scores:
        teacher_N = candidate_logprobs(choice.scores[TEACHER])
        found["teacher_right"] = rank_of(teacher_N, choice.gold) == 1
        found["candidate_kl"] = kl_divergence(teacher_N, student_N)
    return found
