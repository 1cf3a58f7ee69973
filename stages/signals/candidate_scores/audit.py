"""What an audit asks of a live teacher about rows of ``candidate_scores``: scores, made again."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from schemas.tables.episodes import EPISODES
from stages.signals.candidate_scores.stage import CandidateScoresStage
from stages.signals.candidate_scores.work import Branches, open_work
from stages.signals.scoring.agreement import SUMS, Ask, Measure, Question, remade
from stages.stage import StageContext

_CLOSE = {"candidate_logprobs_N": "candidate_logprobs_N"}


def measures(stage: CandidateScoresStage) -> dict[str, Measure]:
    """Return what is compared: one number a candidate."""
    return {"candidate_logprobs_N": Measure("nats", "score of a candidate", SUMS)}


def questions(
    stage: CandidateScoresStage, context: StageContext, rows: pa.Table, most: int | None
) -> list[Question]:
    """Return what to ask about some episodes: all of each, as a candidate follows the prompt."""
    asked = []
    episodes = [episode for batch in rows.to_batches() for episode in EPISODES.rows(batch)]
    for at, episode in enumerate(episodes):
        branches = Branches.of(episode)
        num_read = episode.answer_start + sum(branches.counts)
        places_N = np.arange(len(branches.candidates))
        asked.append(Question(episode.sample_id, rows.slice(at, 1), num_read, places_N))
    return asked


@contextmanager
def open_live(stage: CandidateScoresStage, context: StageContext) -> Iterator[Ask]:
    """Open the stage's own work for single rows."""
    with open_work(stage, context) as work:
        yield remade(work, ("candidate_num_tokens_N",), _CLOSE)
