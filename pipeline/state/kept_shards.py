"""What an earlier run left of a step: shards it finished, hashed again while the rest is made.

A shard is kept when its record can be read and its file has the right size, which is known at once.
That its bytes are still those that were written takes reading all of them: at a terabyte that is
a quarter of an hour of one core, so threads do it beside the work, and a shard whose bytes have
changed is made again at the end. An object store has kept the checksum of each object, which cannot
be torn, so there nothing is hashed.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import numpy as np
import numpy.typing as npt

from schemas.storage.files import Folder, sha256_of
from schemas.storage.object_path import ObjectPath
from schemas.storage.records import (
    ShardRecord,
    listed_shards,
    read_records,
    read_unverified_record,
    shard_name,
)
from schemas.storage.shard_list import ShardListBuilder

READING_THREADS = 16  # small files: on a network, each is a wait
RECORDS_AT_ONCE = 256
OBJECTS_AT_ONCE = 4096  # asked of an object store
HASHING_THREADS = 8


@dataclass
class KeptShards:
    """``shards`` are those asked for; ``is_kept_S`` says, of all, which of them have a record.

    ``records`` has those, and takes the rest.
    """

    folder: Folder
    shards: range
    is_kept_S: npt.NDArray[np.bool_]
    sha256_SB: npt.NDArray[np.uint8]
    records: ShardListBuilder = field(default_factory=ShardListBuilder)
    _threads: list[Future[list[int]]] = field(default_factory=list)

    @property
    def num_kept(self) -> int:
        """How many shards need not be made, if they verify."""
        return int(self.is_kept_S.sum())

    def missing(self) -> list[int]:
        """Return the shards that have to be made."""
        is_kept = self.is_kept_S[self.shards.start : self.shards.stop]
        return [self.shards.start + int(at) for at in np.flatnonzero(~is_kept)]

    def keep(self, index: int, record: ShardRecord) -> None:
        """Take a shard for finished."""
        self.is_kept_S[index] = True
        self.sha256_SB[index] = np.frombuffer(bytes.fromhex(record.sha256), np.uint8)
        self.records.add(index, record)

    def changed(self) -> list[int]:
        """Wait for the hashes; return the shards whose bytes are not those of their records."""
        return sorted(index for thread in self._threads for index in thread.result())


@contextmanager
def kept_shards(folder: Folder, num_shards: int, shards: range) -> Iterator[KeptShards]:
    """Read the records of some shards of a step and begin to hash what they are about."""
    none, no_sha256 = np.zeros(num_shards, bool), np.zeros((num_shards, 32), np.uint8)
    kept = KeptShards(folder, shards, none, no_sha256)
    if isinstance(folder, ObjectPath):
        for index, record in _records_in_store(folder, num_shards, shards):
            kept.keep(index, record)
        yield kept
        return
    for index, record in _records(folder, num_shards, shards):
        kept.keep(index, record)
    num_threads = min(HASHING_THREADS, os.cpu_count() or 1, kept.num_kept)
    given_up = Event()
    if num_threads == 0:
        yield kept
        return
    with ThreadPoolExecutor(num_threads) as pool:
        queue = _Queue(np.flatnonzero(kept.is_kept_S))
        kept._threads = [pool.submit(_hash, kept, queue, given_up) for _ in range(num_threads)]
        try:
            yield kept
        finally:
            given_up.set()


def _records_in_store(
    folder: ObjectPath, num_shards: int, shards: range
) -> Iterator[tuple[int, ShardRecord]]:
    """Yield the shards that have a record and an object with its size and checksum."""
    for first in range(shards.start, shards.stop, OBJECTS_AT_ONCE):
        indices = range(first, min(first + OBJECTS_AT_ONCE, shards.stop))
        names = [shard_name(index, num_shards) for index in indices]
        for index, record in zip(indices, read_records(folder, names), strict=True):
            if record is not None:
                yield index, record


def _records(folder: Path, num_shards: int, shards: range) -> Iterator[tuple[int, ShardRecord]]:
    """Yield the shards that have a record and a file of the right size."""

    def read(block: list[int]) -> list[tuple[int, ShardRecord]]:
        names = ((index, shard_name(index, num_shards)) for index in block)
        records = ((index, read_unverified_record(folder, name)) for index, name in names)
        return [(index, record) for index, record in records if record is not None]

    found = listed_shards(folder, num_shards, ".json")[shards.start : shards.stop]
    listed = (shards.start + np.flatnonzero(found)).tolist()
    blocks = [listed[at : at + RECORDS_AT_ONCE] for at in range(0, len(listed), RECORDS_AT_ONCE)]
    with ThreadPoolExecutor(READING_THREADS) as pool:
        for records in pool.map(read, blocks):
            yield from records


class _Queue:
    """Shards that are to be hashed, for several threads."""

    def __init__(self, indices: npt.NDArray[np.int64]) -> None:
        self._indices = iter(indices)
        self._lock = Lock()

    def take(self) -> int | None:
        with self._lock:
            return next(map(int, self._indices), None)


def _hash(kept: KeptShards, queue: _Queue, given_up: Event) -> list[int]:
    changed = []
    while not given_up.is_set() and (index := queue.take()) is not None:
        path = kept.folder / f"{shard_name(index, len(kept.is_kept_S))}.arrow"
        try:
            found = sha256_of(path)
        except OSError:
            found = ""
        if found != kept.sha256_SB[index].tobytes().hex():
            changed.append(index)
    return changed
