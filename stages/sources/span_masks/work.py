"""The work of ``span_masks``: spans of a user's files, held to the row that they are about.

Dimensions: T = tokens of a row, P = its scored tokens, S = spans.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.scored_spans import SCORED, span_problem, span_targets
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.documents import DOCUMENTS
from schemas.tables.span_masks import SpanMask
from stages.sources.reading.lines import field_of, text_of
from stages.sources.reading.records import read_records
from stages.sources.reading.rejects import MalformedRecord, Rejects
from stages.sources.span_masks.stage import SpanFiles, SpanMasksStage
from stages.stage import Rejected, StageContext, Work

Spans = npt.NDArray[np.int64]
Masks = dict[str, Spans | str]  # or, in words, why there is none to go by
_MOST = 2**31 - 1  # indices are stored in 32 bits


@contextmanager
def open_work(stage: SpanMasksStage, context: StageContext) -> Iterator[Work]:
    """Read the spans of all rows; the work looks up those of one shard."""
    masks = read_masks(stage.source)

    def work(shard: pa.Table) -> Iterable[SpanMask | Rejected]:
        for batch in shard.to_batches():
            keys, ids = (DOCUMENTS.column_values(batch, n) for n in ("sample_id", "input_ids_T"))
            scored: list[Any] = [None] * len(keys)
            if SCORED in batch.schema.names:
                scored = CONVERSATIONS.column_values(batch, SCORED)
            for sample_id, ids_T, scored_S2 in zip(keys, ids, scored, strict=True):
                targets_P = np.arange(1, len(ids_T))
                if scored_S2 is not None:
                    targets_P = span_targets(scored_S2)
                yield _row(sample_id, len(ids_T), targets_P, masks.get(sample_id, "no spans"))

    yield work


def _row(
    sample_id: str, num_tokens: int, targets_P: Spans, spans: Spans | str
) -> SpanMask | Rejected:
    """Make one row; a first token, which nothing stands before, is left out of its span."""
    if isinstance(spans, str):
        return Rejected(sample_id, spans)
    own_S2 = np.maximum(spans, 1)
    own_S2 = own_S2[~(own_S2 == 1).all(axis=1)]
    if len(own_S2) and span_problem(own_S2, num_tokens):
        return Rejected(sample_id, "spans do not lie in order within its tokens")
    if not np.isin(targets_P, span_targets(own_S2)).any():
        return Rejected(sample_id, "no scored token in its spans")
    return SpanMask(sample_id=sample_id, selected_S2=own_S2.astype(np.int32))


def read_masks(files: SpanFiles) -> Masks:
    """Return the spans of each row, by ``sample_id``.

    A record without a key is passed over; raises ConfigError where all are malformed.
    """
    masks: Masks = {}
    with Rejects().of_source() as rejects:
        for place, record in read_records(files, rejects):
            try:
                key = text_of(record, "sample_id")
                spans = _spans_of(record, files.column)
            except MalformedRecord as error:
                rejects.add(place, error)
                continue
            masks[key] = spans if key not in masks else "more than one record of spans"
    return masks


def _spans_of(record: dict[str, Any], column: str) -> Spans | str:
    value = field_of(record, column, "a list of pairs, start and end")
    if not isinstance(value, list) or not all(map(_is_span, value)):
        return "spans are no list of pairs of token indices"
    return np.asarray(value, np.int64).reshape(-1, 2)


def _is_span(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(mark) is int and 0 <= mark <= _MOST for mark in pair)
    )
