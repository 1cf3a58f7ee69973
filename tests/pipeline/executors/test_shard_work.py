"""Shards whose rows are written beside the work: the same bytes, and nothing half done is left."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.executors.shard_task import RowCount, ShardTask, write_output
from pipeline.executors.shard_work import run_shards, try_rows
from schemas.errors import EngineError, RejectLimitError, StoreError
from schemas.storage.files import sha256_of
from schemas.storage.records import shard_name
from schemas.storage.shards import write_shard
from schemas.tables.documents import DOCUMENTS
from stages.signals.scoring.logits import LogitBlocks
from stages.stage import Later, Rejected
from tests.fixtures.tiny_teacher import (
    ENCODINGS,
    Teacher,
    as_document,
    real_documents,
    shard_of,
    stage_of,
)

BOUND = DOCUMENTS.bind(vocab_size=300)
ROWS, SHARDS = 40, 3
WITHIN_S = 60.0


@pytest.fixture
def tasks(tmp_path: Path) -> list[ShardTask]:
    made = []
    for index in range(SHARDS):
        file = tmp_path / f"documents-{index}.arrow"
        write_shard(file, BOUND, [as_document(np.array([index, n, 7])) for n in range(ROWS)])
        made.append(
            ShardTask(
                folder=tmp_path / "out",
                index=index,
                num_shards=SHARDS,
                split="train",
                input_file=file,
                input_sha256=sha256_of(file),
                num_rows=ROWS,
                max_rejected_fraction=0.5,
                made_by={},
            )
        )
    return made


def rows_of(shard: pa.Table) -> list[Any]:
    return [row for batch in shard.to_batches() for row in DOCUMENTS.rows(batch)]


def scored(shard: pa.Table) -> Iterator[Any]:
    """Rows, at once and later, and rejections, at once and later."""
    for number, row in enumerate(rows_of(shard)):
        made: Any = Rejected(row.sample_id, "unlucky") if number % 7 == 3 else row
        yield Later(lambda made=made: made, 100) if number % 2 else made  # type: ignore[misc]


def arrow_files(folder: Path) -> dict[str, bytes]:
    """Return the shards; a record has times in it."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.arrow"))}


def test_bytes_and_order_are_those_of_rows_written_one_after_another(
    tasks: list[ShardTask], tmp_path: Path
) -> None:
    records = list(run_shards(tasks, BOUND, scored, {}))
    assert [record.name for record in records] == [shard_name(i, SHARDS) for i in range(SHARDS)]
    for task, record in zip(tasks, records, strict=True):
        rows = rows_of(pa.ipc.open_file(task.input_file).read_all())
        kept = [row for number, row in enumerate(rows) if number % 7 != 3]
        alone = write_output(
            tmp_path / "alone", task.name, BOUND, RowCount(kept), split="train", made_by={}
        )
        assert (record.sha256, record.num_rows) == (alone.sha256, alone.num_rows)
        assert record.rejects == {"unlucky": ROWS - len(kept)}
        assert task.finished() == record


@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_teachers_rows_are_the_same_made_at_once_and_later(
    kind: str,
    tiny_model: Path,
    paragraphs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = real_documents(tiny_model, paragraphs)
    teacher = Teacher(tiny_model, 512, documents, [], [])
    bound = stage_of(kind).bind(teacher.context(tmp_path))
    at_once = write_shard(tmp_path / "at-once.arrow", bound, teacher.rows(kind, tmp_path))
    monkeypatch.setattr(
        LogitBlocks, "later", lambda self, hidden, make: Later(lambda: make(hidden), hidden.nbytes)
    )
    file = tmp_path / "documents.arrow"
    write_shard(file, DOCUMENTS.bind(vocab_size=512), documents)
    task = ShardTask(
        tmp_path / "out", 0, 1, "train", file, sha256_of(file), len(documents), 0.0, {}
    )
    with stage_of(kind).open(teacher.context(tmp_path)) as work:
        assert all(isinstance(made, Later) for made in work(shard_of(documents, 512)))
        (record,) = run_shards([task], bound, work, {})
    assert record.sha256 == at_once.sha256


def test_the_work_goes_on_with_the_next_shard_while_one_is_written(
    tasks: list[ShardTask],
) -> None:
    begun = [threading.Event() for _ in tasks]

    def work(shard: pa.Table) -> Iterator[Any]:
        rows = rows_of(shard)
        index = int(rows[0].input_ids_T[0])
        begun[index].set()
        *first, last = rows
        yield from first
        follows = begun[min(index + 1, SHARDS - 1)]
        yield Later(lambda: last if follows.wait(WITHIN_S) else None, 100)

    assert len(list(run_shards(tasks, BOUND, work, {}))) == SHARDS


def test_the_work_is_at_most_one_shard_ahead_of_the_writer(tasks: list[ShardTask]) -> None:
    yielded = [threading.Event() for _ in tasks]

    def work(shard: pa.Table) -> Iterator[Any]:
        *first, last = rows_of(shard)
        index = int(last.input_ids_T[0])
        assert index < 2 or tasks[index - 2].finished()
        follows = yielded[min(index + 1, SHARDS - 1)]
        yield from first
        yield Later(lambda: last if follows.wait(WITHIN_S) else None, 100)
        yielded[index].set()

    assert len(list(run_shards(tasks, BOUND, work, {}))) == SHARDS


def test_a_lost_engine_leaves_the_shards_before_it_whole_and_nothing_of_its_own(
    tasks: list[ShardTask], tmp_path: Path
) -> None:
    def work(shard: pa.Table) -> Iterator[Any]:
        rows = rows_of(shard)
        yield from rows[:20]
        if rows[0].input_ids_T[0] == 2:
            raise EngineError("the engine died")
        yield from rows[20:]

    records = run_shards(tasks, BOUND, work, {})
    assert [next(records).name, next(records).name] == [tasks[0].name, tasks[1].name]
    with pytest.raises(EngineError, match="the engine died"):
        next(records)
    assert sorted(arrow_files(tmp_path / "out")) == [f"{task.name}.arrow" for task in tasks[:2]]
    assert not list((tmp_path / "out").glob("*.tmp-*"))


def fails_to_write(tasks: list[ShardTask]) -> list[ShardTask]:
    assert isinstance(tasks[1].folder, Path)
    no_folder = tasks[1].folder.with_name("file")
    no_folder.write_text("")
    return [tasks[0], replace(tasks[1], folder=no_folder), tasks[2]]


def rejects_too_many(tasks: list[ShardTask]) -> list[ShardTask]:
    return [tasks[0], replace(tasks[1], max_rejected_fraction=0.01), tasks[2]]


@pytest.mark.parametrize(
    ("fault", "error"), [(fails_to_write, StoreError), (rejects_too_many, RejectLimitError)]
)
def test_a_shard_that_cannot_be_written_ends_the_run_with_its_own_error(
    fault: Callable[[list[ShardTask]], list[ShardTask]],
    error: type[Exception],
    tasks: list[ShardTask],
    tmp_path: Path,
) -> None:
    records = run_shards(fault(tasks), BOUND, scored, {})
    assert next(records).name == tasks[0].name
    with pytest.raises(error, match=tasks[1].name if error is RejectLimitError else "file"):
        list(records)
    assert list(arrow_files(tmp_path / "out")) == [f"{tasks[0].name}.arrow"]
    assert not list((tmp_path / "out").glob("*.tmp-*"))


def test_a_run_that_is_interrupted_leaves_nothing_half_written(
    tasks: list[ShardTask], tmp_path: Path
) -> None:
    def work(shard: pa.Table) -> Iterator[Any]:
        yield from rows_of(shard)[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_shards(tasks, BOUND, work, {}))
    assert not list((tmp_path / "out").glob("*"))


def test_rows_that_are_tried_are_made_too(tasks: list[ShardTask]) -> None:
    made: list[int] = []

    def work(shard: pa.Table) -> Iterable[Any]:
        return [Later(lambda: made.append(1), 1) for _ in rows_of(shard)]

    try_rows(tasks[0], range(3, 8), work)
    assert len(made) == 5
