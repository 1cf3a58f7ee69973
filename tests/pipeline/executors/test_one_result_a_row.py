"""A stage answers each row of a shard once and in order; what does not is named, not written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.executors.shard_task import ShardTask
from pipeline.executors.shard_work import run_shard
from schemas.errors import TeacherCacheError
from schemas.storage.files import sha256_of
from schemas.storage.shards import write_shard
from schemas.tables.documents import DOCUMENTS
from stages.sources.demonstrations.stage import DemonstrationsStage
from stages.stage import Rejected, StageContext
from tests.fixtures.tiny_teacher import as_document

BOUND = DOCUMENTS.bind(vocab_size=300)


@pytest.fixture
def task(tmp_path: Path) -> ShardTask:
    documents = [as_document(np.array([index, 7])) for index in range(5)]
    file = tmp_path / "documents.arrow"
    write_shard(file, BOUND, documents)
    return ShardTask(
        folder=tmp_path / "out",
        index=0,
        num_shards=1,
        split="train",
        input_file=file,
        input_sha256=sha256_of(file),
        num_rows=5,
        max_rejected_fraction=1.0,
        made_by={},
    )


def rows_of(shard: pa.Table) -> list[Any]:
    return [row for batch in shard.to_batches() for row in DOCUMENTS.rows(batch)]


FAULTS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "row 2 is sample": lambda rows: [*rows[:2], *rows[3:]],  # dropped
    "row 4 is sample .*, its result is of sample none": lambda rows: rows[:4],
    "row 3 is sample": lambda rows: [*rows[:3], *rows[2:]],  # repeated
    "row 5 is sample none": lambda rows: [*rows, rows[4]],
    "row 1 is sample": lambda rows: [rows[0], rows[2], rows[1], *rows[3:]],
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_row_dropped_repeated_or_out_of_order_ends_the_run(said: str, task: ShardTask) -> None:
    with pytest.raises(
        TeacherCacheError, match=rf"shard-00000-of-00001: the stage that writes documents.*{said}"
    ) as caught:
        run_shard(task, BOUND, lambda shard: FAULTS[said](rows_of(shard)), {})
    assert "\n" not in str(caught.value) and task.finished() is None
    assert not list(Path(str(task.folder)).glob("shard-*"))


def test_rows_with_keys_of_their_own_are_held_to_their_source(
    task: ShardTask, tmp_path: Path
) -> None:
    """``demonstrations`` makes another row of each, and says of which."""
    documents = [as_document(np.array([index, 7, 8, 9, 10])) for index in range(5)]
    write_shard(task.folder.parent / "documents.arrow", BOUND, documents)
    task = replace(task, input_sha256=sha256_of(tmp_path / "documents.arrow"))
    stage = DemonstrationsStage.model_validate(
        {"stage": "demonstrations", "input": "documents", "demonstration_fraction": 0.5}
    )
    context = StageContext(Path(), 300, input_table="documents")
    table = stage.bind(context)
    with stage.open(context) as work:
        assert run_shard(task, table, work, {}).num_rows == 5
        with pytest.raises(TeacherCacheError, match=r"writes demonstrations.*row 1 is sample"):
            run_shard(task, table, lambda shard: list(work(shard))[::2], {})


def test_kept_and_rejected_rows_are_the_rows_given(task: ShardTask) -> None:
    def work(shard: pa.Table) -> list[Any]:
        rows = rows_of(shard)
        return [Rejected(rows[0].sample_id, "no reason"), *rows[1:]]

    record = run_shard(task, BOUND, work, {})
    assert record.num_rows + sum(record.rejects.values()) == 5
