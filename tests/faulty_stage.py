"""A stage without a model whose work goes wrong where a test asks for it, and ways to run it."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from pipeline.executors.dispatch import Limits
from pipeline.executors.local.shards import run_local
from pipeline.executors.shard_task import ShardTask
from schemas.errors import ConfigError, EngineError
from schemas.storage.manifest import Manifest, read_manifest
from schemas.storage.records import ShardRecord
from schemas.storage.shards import read_shard
from schemas.table import BoundTable, Table
from schemas.tables.documents import DOCUMENTS, Document
from stages.stage import Estimate, StageContext, TableStage, Work


class FaultyStage(TableStage):
    """Turns documents round, token by token. Rows are named by ``sample_id``.

    ``marks`` is a folder where a worker leaves a file for each shard it begins: named by its
    process id and the shard's first row, holding the folder it runs in and the GPUs it may see.
    """

    VERSION: ClassVar[int] = 1
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (DOCUMENTS,)

    stage: Literal["faulty"] = "faulty"
    input: str = "documents"
    model: str = "none"
    marks: Path
    seconds_a_row: float = 0.0
    slow: tuple[str, ...] = ()  # twenty times as long
    deadly: tuple[str, ...] = ()  # the process ends
    hanging: tuple[str, ...] = ()  # no answer comes
    failing: tuple[str, ...] = ()  # the engine says it has died
    wrong: tuple[str, ...] = ()  # an error that is the user's
    slow_worker: bool = False  # the first worker there is takes ten times as long as others
    crowded_at: int = 10**9  # more rows than that at once end the process

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
        pace = 10 if self.slow_worker and self._is_slow() else 1
        if len(shard):
            mark = self.marks / f"{os.getpid()}-{shard['sample_id'][0]}"
            mark.write_text(f"{os.getcwd()}\n{os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
        if len(shard) > self.crowded_at:
            os._exit(1)
        for batch in shard.to_batches():
            for row in DOCUMENTS.rows(batch):
                time.sleep(self.seconds_a_row * (20 if row.sample_id in self.slow else pace))
                self._go_wrong(row.sample_id)
                yield Document(
                    sample_id=row.sample_id, split=row.split, input_ids_T=row.input_ids_T[::-1]
                )

    def _is_slow(self) -> bool:
        name = self.marks.with_name("slow worker")
        with suppress(FileExistsError), name.open("x") as stream:
            stream.write(str(os.getpid()))
        return name.read_text() == str(os.getpid())

    def _go_wrong(self, sample_id: str) -> None:
        if sample_id in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if sample_id in self.hanging:
            time.sleep(3600)
        if sample_id in self.failing:
            raise EngineError("the engine died on a batch")
        if sample_id in self.wrong:
            raise ConfigError("a row says that the recipe is wrong")


@dataclass
class Shards:
    """Finished documents and a folder to write to: what ``run_local`` and ``run_on_ray`` take."""

    documents: Path
    folder: Path
    marks: Path
    max_rejected_fraction: float = 1.0
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for folder in (self.folder, self.marks):
            folder.mkdir(parents=True)

    def stage(self, **faults: Any) -> FaultyStage:
        return FaultyStage(marks=self.marks, **faults)

    @property
    def context(self) -> StageContext:
        return StageContext(self.folder, read_manifest(self.documents).vocab_size)

    @property
    def tasks(self) -> list[ShardTask]:
        shards = read_manifest(self.documents).shards
        return [
            ShardTask(
                folder=self.folder,
                index=index,
                num_shards=len(shards),
                split=shard.split,
                input_file=self.documents / shard.file,
                input_sha256=shard.sha256,
                num_rows=shard.num_rows,
                max_rejected_fraction=self.max_rejected_fraction,
                made_by={},
            )
            for index, shard in enumerate(shards)
        ]

    def sample_ids(self, task: ShardTask) -> list[str]:
        assert isinstance(task.input_file, Path)
        return [str(name) for name in read_shard(task.input_file)["sample_id"]]

    def run_local(self, stage: FaultyStage, limits: Limits) -> Iterator[ShardRecord]:
        return run_local(stage, self.context, self.tasks, limits, warned=self.warnings.append)

    def bytes(self) -> dict[str, bytes]:
        """Everything that was written and has to be equal between runs."""
        patterns = ("shard-*.arrow", "*.rejects.jsonl")
        return {p.name: p.read_bytes() for pattern in patterns for p in self.folder.glob(pattern)}
