"""A stage of fixed processor cost a shard, single-threaded, without a model.

Its work is a loop of integer arithmetic in Python: no library, no second thread, the same number of
rounds for every shard. Around it a shard is read, checked, encoded and committed as always.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from pipeline.executors.shard_task import ShardTask
from schemas.sample_id import sample_id_of
from schemas.storage.manifest import Manifest
from schemas.storage.shards import write_shard
from schemas.table import BoundTable, Table
from schemas.tables.documents import DOCUMENTS, Document
from stages.stage import Estimate, StageContext, TableStage, Work

VOCAB_SIZE, ROWS, LENGTH = 512, 8, 64


class BurnStage(TableStage):
    """Gives the documents back after ``rounds`` rounds of arithmetic a shard."""

    VERSION: ClassVar[int] = 1
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (DOCUMENTS,)

    stage: Literal["burn"] = "burn"
    input: str = "documents"
    model: str = "none"
    rounds: int

    @property
    def table(self) -> Table[Any]:
        return DOCUMENTS

    def bind(self, context: StageContext) -> BoundTable[Any]:
        return self.table.bind(vocab_size=context.vocab_size)

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        return Estimate(0, source.num_bytes)

    @contextmanager
    def open(self, context: StageContext) -> Iterator[Work]:
        yield self._work

    def _work(self, shard: pa.Table) -> Iterator[Document]:
        burn(self.rounds)
        for batch in shard.to_batches():
            yield from DOCUMENTS.rows(batch)


def burn(rounds: int) -> int:
    """Spend processor time: a linear congruential generator, step by step."""
    state = 1
    for _ in range(rounds):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
    return state


def make_tasks(folder: Path, num_shards: int) -> list[ShardTask]:
    """Write ``num_shards`` input shards of random tokens; results go to ``folder``/out."""
    generator = np.random.default_rng(0)
    bound = DOCUMENTS.bind(vocab_size=VOCAB_SIZE)
    out = folder / "out"
    os.makedirs(out)
    tasks = []
    for index in range(num_shards):
        tokens = generator.integers(0, VOCAB_SIZE, (ROWS, LENGTH))
        rows = [Document(sample_id=sample_id_of(t), split="train", input_ids_T=t) for t in tokens]
        path = folder / f"input-{index}.arrow"
        written = write_shard(path, bound, rows)
        tasks.append(
            ShardTask(
                folder=out,
                index=index,
                num_shards=num_shards,
                split="train",
                input_file=path,
                input_sha256=written.sha256,
                num_rows=ROWS,
                max_rejected_fraction=0.0,
                made_by={},
            )
        )
    return tasks
