"""Shards made: the work is done in this thread, its rows are written in another beside it."""

from collections import ChainMap
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain, takewhile, zip_longest
from typing import Any, cast

import numpy as np
import pyarrow as pa

from pipeline.executors.overlap import overlapped
from pipeline.executors.shard_task import (
    PieceTask,
    RowCount,
    ShardTask,
    Task,
    input_of,
    write_output,
)
from schemas.errors import TeacherCacheError
from schemas.storage.records import ShardRecord
from schemas.storage.shards import FAST_ZSTD_LEVEL
from schemas.table import BoundTable
from stages.file_map import PieceWork
from stages.models.engines.sequences import WINDOW_BYTES
from stages.stage import Later, Rejected, Work

DEADLY = "the engine dies on it"
_ROW_BYTES = 1 << 10  # of a row beside its arrays
# What the beginning of a shard counts as: two cannot wait, so the work is one shard ahead at most.
_BEGUN_BYTES = WINDOW_BYTES // 2 + 1


def run_shards(
    tasks: Iterable[Task],
    table: BoundTable[Any],
    work: Work | PieceWork,
    notes: dict[str, Any],
    *,
    suffix: str = "",
) -> Iterator[ShardRecord]:
    """Read each input shard or piece, do the work, write the output shard and then its record.

    The work is done in this thread; rows are written in another, so that an engine goes on with
    what is next, of this shard or of the one after it. Up to an engine's window of rows waits, and
    no shard is begun before the last but one is written. Pieces have no engine that would wait:
    their rows are written in this thread, as handing each over would take longer than it saves.

    ``notes``, as they are when a shard is written, go into its record beside what the task says of
    its making; ``suffix`` ends the names of all files. Raises TeacherCacheError where the work does
    not answer each row once, in order.
    """
    tasks = iter(tasks)
    first = next(tasks, None)
    if first is None:
        return
    worked = _worked(chain([first], tasks), work)
    if isinstance(first, PieceTask):
        with closing(worked):
            yield from _written(worked, table, notes, suffix)
        return
    yield from overlapped(
        worked,
        lambda items: _written(items, table, notes, suffix),
        bytes_of=_bytes_of,
        most_bytes=WINDOW_BYTES,
    )


def run_shard(
    task: Task,
    table: BoundTable[Any],
    work: Work | PieceWork,
    notes: dict[str, Any],
    *,
    suffix: str = "",
) -> ShardRecord:
    """Make one shard, as ``run_shards`` does."""
    (record,) = run_shards([task], table, work, notes, suffix=suffix)
    return record


@dataclass(frozen=True, slots=True)
class _Begun:
    """Stands before the results of a shard, and ``_DONE`` after them.

    ``given`` are the keys of the rows that the work was given, each of which has to have a result.
    """

    task: Task
    given: Sequence[str] | None = None
    kept_out: Sequence[Rejected] = ()


_DONE = object()


def _worked(tasks: Iterable[Task], work: Work | PieceWork) -> Generator[Any, None, None]:
    """Yield what the work makes of each shard, as it comes."""
    for task in tasks:
        if isinstance(task, PieceTask):
            yield _Begun(task)
            yield from cast(PieceWork, work)(task.piece)
        else:
            shard = input_of(task)
            sample_ids = shard["sample_id"].to_pylist()
            is_deadly = np.zeros(len(shard), bool)
            is_deadly[list(task.deadly_rows)] = True
            given = [sample_ids[row] for row in np.flatnonzero(~is_deadly)]
            dead = [Rejected(sample_ids[row], DEADLY) for row in task.deadly_rows]
            yield _Begun(task, given, dead)
            if dead:
                shard = shard.filter(pa.array(~is_deadly))
            yield from cast(Work, work)(shard)
        yield _DONE


def _written(
    items: Iterator[Any], table: BoundTable[Any], notes: dict[str, Any], suffix: str
) -> Iterator[ShardRecord]:
    """Write each shard and its record."""
    for begun in items:
        task = begun.task
        results: Iterator[Any] = map(_made, takewhile(lambda item: item is not _DONE, items))
        if begun.given is not None:
            results = chain(_one_each(begun, results, table.table.name), begun.kept_out)
        level = FAST_ZSTD_LEVEL if begun.given is None else None
        rows = RowCount(results, task.max_rejected_fraction)
        made_by = ChainMap(notes, dict(task.made_by))
        yield write_output(
            task.folder,
            task.name,
            table,
            rows,
            split=task.split,
            made_by=made_by,
            zstd_level=level,
            suffix=suffix,
        )


def _made(result: Any) -> Any:
    return result.make() if isinstance(result, Later) else result


def _bytes_of(result: Any) -> int:
    """Return what a result holds in memory until it is written, for ``run_shards``."""
    if isinstance(result, Later):
        return result.num_bytes
    if isinstance(result, _Begun):
        return _BEGUN_BYTES
    if isinstance(result, list):
        return sum(map(_bytes_of, result))
    names = (column.name for column in fields(result)) if is_dataclass(result) else ()
    return _ROW_BYTES + sum(getattr(getattr(result, name), "nbytes", 0) for name in names)


def _one_each(begun: _Begun, results: Iterator[Any], table: str) -> Iterator[Any]:
    """Yield the work's results, of which each row has to have one, in order, or a list of some.

    A result with a ``source_id`` is a row with a key of its own, made of the row of that key.
    """
    task, given = begun.task, begun.given or ()
    missing = object()
    for row, (sample_id, result) in enumerate(zip_longest(given, results, fillvalue=missing)):
        made = result if isinstance(result, list) else [result]
        keys = {getattr(one, "source_id", getattr(one, "sample_id", "none")) for one in made}
        if sample_id is missing or keys != {sample_id}:
            found = ", ".join(sorted(map(str, keys))) or "none"
            asked = "none" if sample_id is missing else sample_id
            raise TeacherCacheError(
                f"{task.folder / task.name}: the stage that writes {table} was given "
                f"{len(given)} rows; row {row} is sample {asked}, its result is of sample "
                f"{found}: a stage answers each row once and in order, mend its work"
            )
        yield from made


def try_rows(task: Task, rows: range, work: Work | PieceWork) -> None:
    """Do the work on some of the input's rows and keep nothing of it."""
    assert isinstance(task, ShardTask)
    for result in cast(Work, work)(input_of(task).slice(rows.start, len(rows))):
        _made(result)
