"""What an audit asks of a live teacher about rows of ``subset_preferences``: draws and scores."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyarrow as pa

from schemas.tables.episodes import EPISODES
from stages.signals.scoring.agreement import SUMS, Ask, Measure, Question, Row, remade
from stages.signals.subset_preferences.stage import SubsetPreferencesStage
from stages.signals.subset_preferences.work import open_work, ranks_of
from stages.stage import StageContext

_CLOSE = {"answer_logprobs_N": "answer_logprobs_N"}
_EXACT = ("subset_demonstrations_S", "subset_sizes_N", "num_answer_tokens")


def measures(stage: SubsetPreferencesStage) -> dict[str, Measure]:
    """Return what is compared: one number a subset; the draw of subsets has to be the same."""
    return {"answer_logprobs_N": Measure("nats", "log-prob of the answer", SUMS)}


def questions(
    stage: SubsetPreferencesStage, context: StageContext, rows: pa.Table, most: int | None
) -> list[Question]:
    """Return what to ask about some episodes: all of each, with half of it in a subset."""
    asked = []
    episodes = [episode for batch in rows.to_batches() for episode in EPISODES.rows(batch)]
    for at, episode in enumerate(episodes):
        num_read = stage.num_subsets * len(episode.input_ids_T) // 2
        places_N = np.arange(stage.num_subsets)
        asked.append(Question(episode.sample_id, rows.slice(at, 1), num_read, places_N))
    return asked


@contextmanager
def open_live(stage: SubsetPreferencesStage, context: StageContext) -> Iterator[Ask]:
    """Open the stage's own work for single rows."""
    with open_work(stage, context) as work:
        yield remade(work, _EXACT, _CLOSE, partial(_other_ranks, stage))


def _other_ranks(stage: SubsetPreferencesStage, stored: Row) -> str:
    """Say what is wrong with ranks, which follow from the stored scores alone."""
    ranks_N = ranks_of(stored["answer_logprobs_N"], tie_tolerance=stage.tie_tolerance)
    if np.array_equal(ranks_N, stored["ranks_N"]):
        return ""
    return f"ranks_N is {stored['ranks_N'].tolist()}, its scores have {ranks_N.tolist()}"
