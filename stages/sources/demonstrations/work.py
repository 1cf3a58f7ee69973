"""The work of ``demonstrations``: rows of documents or episodes, cut by budgets of tokens.

Dimensions: T = tokens of a row, M = demonstrations.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.tables.demonstrations import Demonstrated
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.episodes import EPISODES, Episode
from stages.sources.demonstrations.stage import DemonstrationsStage
from stages.stage import Rejected, StageContext, Work

Array = npt.NDArray[Any]
_NO_IDS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class _Source:
    """One row before it is cut; an answer may be empty, and then there are no candidates."""

    sample_id: str
    split: str
    prefix: Array
    demonstrations: list[Array]
    query: Array
    answer: Array
    episode: Episode | None = None


@contextmanager
def open_work(stage: DemonstrationsStage, context: StageContext) -> Iterator[Work]:
    """Nothing is loaded; the work cuts the rows of one shard."""
    of_episodes = context.input_table == EPISODES.name

    def work(shard: pa.Table) -> Iterable[Demonstrated | Rejected]:
        for batch in shard.to_batches():
            sources: Iterable[_Source]
            if of_episodes:
                sources = map(_of_episode, EPISODES.rows(batch))
            else:
                sources = (_of_document(stage, row) for row in DOCUMENTS.rows(batch))
            for source in sources:
                yield _cut(stage, source)

    yield work


def _of_document(stage: DemonstrationsStage, row: Document) -> _Source:
    """The first tokens are one demonstration, the others the query."""
    cut = int(stage.demonstration_fraction * len(row.input_ids_T))
    shown, query = np.split(row.input_ids_T, [cut])
    return _Source(row.sample_id, row.split, _NO_IDS, [shown] if cut else [], query, _NO_IDS)


def _of_episode(row: Episode) -> _Source:
    """Each demonstration with the separator that follows it."""
    starts = [*row.demonstrations_M3[:, 0].tolist(), row.query_start]
    prefix, *shown, query, answer = np.split(row.input_ids_T, [*starts, row.answer_start])
    return _Source(row.sample_id, row.split, prefix, shown, query, answer, row)


def _cut(stage: DemonstrationsStage, source: _Source) -> Demonstrated | Rejected:
    """Return the row, or why there is none."""
    shown, prefix = source.demonstrations, source.prefix
    budgets = {"teacher": stage.teacher_tokens, "distiller": stage.distiller_tokens}
    seen = {who: _fitting(prefix, shown, tokens) for who, tokens in budgets.items()}
    reason = ""
    if not shown:
        reason = "no demonstration"
    elif not len(source.query) or len(source.query) + len(source.answer) < 2:
        reason = f"a query of {len(source.query)} tokens, of which none follows another"
    elif not min(seen.values()):
        who = min(seen, key=lambda name: seen[name])
        reason = f"no whole demonstration fits {who}_tokens {budgets[who]}"
    if reason:
        return Rejected(source.sample_id, reason)
    return _row(source, seen["teacher"], seen["distiller"])


def _fitting(prefix: Array, shown: Sequence[Array], budget: int | None) -> int:
    """Return how many of the first demonstrations fit, all of them without a budget."""
    if budget is None:
        return len(shown)
    return sum(total <= budget - len(prefix) for total in accumulate(map(len, shown)))


def _row(source: _Source, num_teacher: int, num_distiller: int) -> Demonstrated:
    shown = source.demonstrations[: max(num_teacher, num_distiller)]
    lengths_M = [len(source.prefix) + len(shown[0]), *map(len, shown[1:])]
    before = np.concatenate([source.prefix, *source.demonstrations[:num_teacher]])
    input_ids_T = np.concatenate([before, source.query, source.answer])
    distiller_ids_L = np.concatenate([source.prefix, *source.demonstrations[:num_distiller]])
    query_start, num_tokens = len(before), len(input_ids_T)
    answer_start = query_start + len(source.query)
    episode = source.episode
    candidate_ids_C = _NO_IDS if episode is None else episode.candidate_ids_C
    row = Demonstrated(
        sample_id=source.sample_id,
        split=source.split,
        source_id=source.sample_id,
        task="" if episode is None else episode.task,
        kind="" if episode is None else episode.kind,
        query_id=source.sample_id if episode is None else episode.query_id,
        draw=0 if episode is None else episode.draw,
        input_ids_T=input_ids_T,
        scored_S2=np.array([[query_start + 1, num_tokens]], np.int32),
        query_start=query_start,
        answer_start=answer_start,
        distiller_ids_L=distiller_ids_L,
        demonstration_ends_M=np.cumsum(lengths_M, dtype=np.int32),
        num_demonstrations=len(source.demonstrations),
        num_teacher_demonstrations=num_teacher,
        num_distiller_demonstrations=num_distiller,
        candidate_ids_C=candidate_ids_C,
        candidate_lengths_N=_NO_IDS if episode is None else episode.candidate_lengths_N,
        gold=-1 if episode is None else episode.gold,
    )
    return replace(row, sample_id=row.hashed_id)
