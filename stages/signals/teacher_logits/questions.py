"""What is asked of a live teacher about rows of the input: all of a row's positions, or the first.

A causal model says of a row's first positions what it says of the whole row, so a question may be
about the beginning alone; an encoder-decoder reads rows whole.

Dimensions: P = compared positions.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.scored_spans import SCORED
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from stages.models.causal_lm.language_head import read_config
from stages.models.encoder_decoder.halves import frame_of
from stages.signals.scoring.agreement import I64Array, Question
from stages.signals.scoring.states import sequences_of, spanned_of
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.signals.teacher_logits.work import halves_of
from stages.stage import StageContext


def questions(
    stage: TeacherLogitsStage, context: StageContext, rows: pa.Table, most: int | None
) -> list[Question]:
    """Return what to ask about some rows of the input: of their first ``most`` positions, or all.

    Of a preference pair so many of each response.
    """
    batches = rows.combine_chunks().to_batches() or [rows.to_batches()[0]]
    if context.input_table == PREFERENCE_PAIRS.name:
        asked = [_of_pair(batch, most) for batch in _one_by_one(batches)]
    elif frame_of(read_config(context.models[stage.model].path)) is not None:
        asked = [_of_halves(batch) for batch in _one_by_one(batches)]
    elif SCORED in rows.schema.names:
        asked = [_of_spans(batch, most) for batch in _one_by_one(batches)]
    else:
        asked = [_of_text(batch, most) for batch in _one_by_one(batches)]
    return asked


def _one_by_one(batches: Sequence[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield from (batch.slice(row, 1) for row in range(batch.num_rows))


def _asked(
    sample_id: str, rows: pa.Table, num_read: int, places_P: I64Array, first: int, num: int
) -> Question:
    expected = {"first_target": first, "number of positions": num}
    return Question(sample_id, rows, num_read, places_P, expected)


def _of_text(batch: pa.RecordBatch, most: int | None) -> Question:
    ((sample_id, ids_T),) = sequences_of(batch)
    num = len(ids_T) - 1
    kept = num if most is None else min(num, most)
    rows = pa.Table.from_batches([batch]).select(["sample_id", "input_ids_T"])
    rows = _cut(rows, "input_ids_T", kept + 1)
    return _asked(sample_id, rows, kept + 1, np.arange(kept), 1, num)


def _of_spans(batch: pa.RecordBatch, most: int | None) -> Question:
    (row,) = spanned_of(batch)
    targets_P = row.targets_P
    kept_P = targets_P if most is None else targets_P[:most]
    rows = pa.Table.from_batches([batch]).select(["sample_id", "input_ids_T", SCORED])
    if not len(targets_P):
        return _asked(row.sample_id, rows, 0, np.arange(0), 0, 0)
    end = int(kept_P[-1]) + 1
    (spans_S2,) = DEMONSTRATIONS.column_values(batch, SCORED)
    cut_S2 = np.minimum(np.asarray(spans_S2, np.int64).reshape(-1, 2), end)
    cut_S2 = cut_S2[cut_S2[:, 0] < cut_S2[:, 1]]
    spans = pa.array([cut_S2.tolist()], rows.schema.field(SCORED).type)
    rows = _cut(rows, "input_ids_T", end).set_column(2, rows.schema.field(SCORED), spans)
    first = int(targets_P[0])
    return _asked(row.sample_id, rows, end - 1, np.arange(len(kept_P)), first, len(targets_P))


def _of_halves(batch: pa.RecordBatch) -> Question:
    (row,) = halves_of(batch)
    targets_P, rows = row.spanned.targets_P, pa.Table.from_batches([batch])
    first = int(targets_P[0]) if len(targets_P) else 0
    num = len(targets_P)
    return _asked(row.spanned.sample_id, rows, len(row.spanned.ids_T), np.arange(num), first, num)


def _of_pair(batch: pa.RecordBatch, most: int | None) -> Question:
    (pair,) = PREFERENCE_PAIRS.rows(batch)
    sizes = len(pair.chosen_ids_C), len(pair.rejected_ids_R)
    kept = [size if most is None else min(size, most) for size in sizes]
    rows = pa.Table.from_batches([batch])
    for name, num in zip(("chosen_ids_C", "rejected_ids_R"), kept, strict=True):
        rows = _cut(rows, name, num)
    places_P = np.concatenate([np.arange(kept[0]), sizes[0] + np.arange(kept[1])])
    first = len(pair.prompt_ids_T)
    return _asked(pair.sample_id, rows, first + sum(kept), places_P, first, sum(sizes))


def _cut(rows: pa.Table, name: str, length: int) -> pa.Table:
    at = rows.schema.get_field_index(name)
    cut = pc.list_slice(rows.column(at), 0, length).cast(rows.schema.field(at).type)
    return rows.set_column(at, rows.schema.field(at), cut)
