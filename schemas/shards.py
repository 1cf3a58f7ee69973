"""Write one shard and read it back: Arrow IPC files, zstd, committed whole.

A shard's name never exists half-written: bytes go to a temporary file beside it, are flushed to
the disk, and take the name in one step; in an object store, to a temporary file of this machine
that is then uploaded. Equal rows give equal bytes: record batches are cut by row count alone and
nothing that varies between runs (time, host, process) is inside the file.
"""

import errno
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from .errors import StoreError
from .object_store import Folder, ObjectPath, uploaded
from .table import BoundTable

ROWS_PER_BATCH = 16  # a reader decompresses one batch to reach one row; 16 x 512 tokens is ~300 kB
ZSTD_LEVEL = 15  # 1 % smaller than level 9, and still 190,000 tokens a second on one core


@dataclass(frozen=True, slots=True)
class ShardFile:
    """What was written: size in bytes and the sha256 of exactly those bytes."""

    num_rows: int
    num_bytes: int
    sha256: str


def write_shard(path: Folder, table: BoundTable[Any], rows: Iterable[Any]) -> ShardFile:
    """Write ``rows`` to ``path`` atomically; raises StoreError when the disk refuses."""
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=ZSTD_LEVEL))
    num_rows = 0
    with atomic_file(path) as stream:
        hashing = _HashingStream(stream)
        with pa.ipc.new_file(
            pa.PythonFile(hashing, mode="w"), table.schema, options=options
        ) as out:
            for group in _groups(rows, ROWS_PER_BATCH):
                out.write_batch(table.to_batch(group))
                num_rows += len(group)
    return ShardFile(num_rows, hashing.num_bytes, hashing.digest.hexdigest())


def read_shard(path: Path) -> pa.Table:
    """Read a whole shard; raises StoreError when the file is missing or torn."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(
            f"cannot read shard {path}: {_first_line(error)}; run `teachercache verify` to see "
            f"which shards are damaged, delete that file and run the recipe again"
        ) from error


def sha256_of(path: Folder) -> str:
    """Return the sha256 of a file's bytes; those of an object are fetched for it."""
    if isinstance(path, ObjectPath):
        return path.sha256()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Folder) -> Iterator[IO[bytes]]:
    """Open a file that appears at ``path`` whole, on success, or not at all."""
    if isinstance(path, ObjectPath):
        with uploaded(path) as file:
            try:
                with file.open("xb") as stream:
                    yield stream
            except OSError as error:
                raise _write_error(file, error) from error
        return
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        with suppress(OSError):  # no folder at all; and the error above is the one to tell
            temporary.unlink(missing_ok=True)


def write_text(path: Folder, text: str) -> None:
    """Write a small file atomically: in an object store, with a single PUT."""
    if isinstance(path, ObjectPath):
        path.write_bytes(text.encode())
        return
    with atomic_file(path) as stream:
        stream.write(text.encode())


def _write_error(path: Path, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"no space left writing {path}: free some or move `execution.root`, then run again; "
            f"finished shards are kept and nothing half-written counts as done"
        )
    return StoreError(f"cannot write {path}: {error.strerror or error}")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _groups(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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
