"""Write one shard and read it back: Arrow IPC files, zstd, committed whole.

A shard's name never exists half-written: bytes go to a temporary file beside it, are flushed to
the disk, and take the name in one step; in an object store, to a temporary file of this machine
that is then uploaded. Equal rows give equal bytes: record batches are cut by row count alone and
nothing that varies between runs (time, host, process) is inside the file.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from ..errors import StoreError, first_line
from ..packing.batches import open_batches, pack, packed_schema
from ..table import BoundTable
from .files import Folder, atomic_file, sha256_of
from .shard_cache import local_file

ROWS_PER_BATCH = 16  # a reader decompresses one batch to reach one row; 16 x 512 tokens is ~300 kB
_SPLIT = b"split"
_WRITTEN_AT_ONCE = 1 << 20  # bytes; Arrow writes each buffer and its padding apart
FAST_ZSTD_LEVEL = 1  # of rows that are copied, not computed: 9 % larger, several times as fast


@dataclass(frozen=True, slots=True)
class ShardFile:
    """What was written: size in bytes and the sha256 of exactly those bytes."""

    num_rows: int
    num_bytes: int
    sha256: str


def write_shard(
    path: Folder, table: BoundTable[Any], rows: Iterable[Any], *, zstd_level: int | None = None
) -> ShardFile:
    """Write ``rows`` to ``path`` atomically; raises StoreError when the disk refuses.

    They are compressed at the table's own level where no other is given. Rows of a packed table
    are in memory all at once, as record batches: their bytes depend on all of them.
    """
    level = table.table.zstd_level if zstd_level is None else zstd_level
    options = pa.ipc.IpcWriteOptions(
        compression=pa.Codec("zstd", compression_level=level),
        use_threads=False,  # to hand a buffer over takes a third of the processor time again
    )
    schema = packed_schema(table.schema) if table.packed else table.schema
    num_rows = 0
    with atomic_file(path) as stream:
        hashing = _HashingStream(stream)
        with (
            pa.BufferedOutputStream(pa.PythonFile(hashing, mode="w"), _WRITTEN_AT_ONCE) as sink,
            pa.ipc.new_file(sink, schema, options=options) as out,
        ):
            batches: Iterable[pa.RecordBatch] = map(table.to_batch, _groups(rows, ROWS_PER_BATCH))
            for batch in pack([*batches]) if table.packed else batches:
                out.write_batch(batch)
                num_rows += batch.num_rows
    return ShardFile(num_rows, hashing.num_bytes, hashing.digest.hexdigest())


def read_shard(path: Path) -> pa.Table:
    """Read a whole shard; raises StoreError when the file is missing or torn."""
    try:
        with pa.memory_map(str(path)) as source:
            return open_batches(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(
            f"cannot read shard {path}: {first_line(error)}; `teachercache verify` says which "
            f"shards are damaged and how to make them anew"
        ) from error


def read_verified(place: Folder, sha256: str) -> pa.Table:
    """Read a shard, here or in a store; raises StoreError where its bytes are not those it had."""
    with local_file(place, sha256) as file:
        if isinstance(place, Path):  # what comes from a store is checked on its way
            found = sha256_of(file) if file.is_file() else "none"
            if found != sha256:
                raise StoreError(
                    f"input shard {place} has sha256 {found[:12]}, its manifest says "
                    f"{sha256[:12]}: run `teachercache verify` and mend that table first"
                )
        return read_shard(file)


def with_split(table: pa.Table, split: str) -> pa.Table:
    """Return a shard's rows with the side that they are on, for tables that have no such column."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _SPLIT: split})


def split_of(table: pa.Table) -> str:
    """Return the side that a shard's rows are on, of what ``with_split`` returned."""
    return str(table.schema.metadata[_SPLIT], "utf-8")


def rows_of_batch(num_rows: int, batch: int) -> int:
    """Return how many rows record batch ``batch`` of a shard of ``num_rows`` rows holds."""
    return max(0, min(ROWS_PER_BATCH, num_rows - batch * ROWS_PER_BATCH))


def _groups(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    source = iter(rows)
    while group := list(islice(source, size)):
        yield group


class _HashingStream:
    """A write-only stream that counts and hashes what passes through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.digest.update(view)
        self.num_bytes += view.nbytes
        return self.stream.write(view)

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        self.closed = True
