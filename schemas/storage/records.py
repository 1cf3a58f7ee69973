"""One finished shard: its name, its JSON record, and whether it is whole."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .files import Folder, at_once, read_many, rename, sha256_of, write_text
from .object_path import ObjectPath


def shard_name(index: int, num_shards: int) -> str:
    """Return the stem that a shard, its record and its rejects share; names sort by index."""
    width = max(5, len(str(num_shards)))
    return f"shard-{index:0{width}d}-of-{num_shards:0{width}d}"


def shard_index(name: str) -> int:
    """Return the index that is in a shard's name."""
    return int(name.split("-")[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One finished shard. ``num_tokens`` counts input tokens, ``num_positions`` scored ones."""

    name: str
    split: str
    num_rows: int
    num_tokens: int
    num_positions: int
    num_bytes: int
    sha256: str
    rejects: Mapping[str, int] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of the Arrow file."""
        return f"{self.name}.arrow"


def write_record(
    folder: Folder, record: ShardRecord, notes: Mapping[str, Any], *, suffix: str = ""
) -> None:
    """Write a shard's record; ``notes`` (engine, timings, host) are kept but compared by nobody.

    With ``suffix``, which ends the file's name, it is no record yet: ``commit_copy`` makes it one.
    """
    body = {"record": asdict(record), "notes": dict(notes)}
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    write_text(folder / f"{record.name}.json{suffix}", text)


_PARTS = (".arrow", ".rejects.jsonl", ".json")  # of a shard, in the order in which they are written


def commit_copy(folder: Folder, record: ShardRecord, suffix: str) -> None:
    """Give the files of a shard that were written with ``suffix`` their own names, the record last.

    No other writer of the shard may be at work.
    """
    for part in _PARTS:
        if part != ".rejects.jsonl" or record.rejects:
            rename(folder / f"{record.name}{part}{suffix}", folder / f"{record.name}{part}")


def drop_copy(folder: Folder, name: str, suffix: str) -> None:
    """Delete the files of a shard that were written with ``suffix``, as many as there are."""
    for part in _PARTS:
        path = folder / f"{name}{part}{suffix}"
        if isinstance(path, ObjectPath):
            path.unlink()
        else:
            path.unlink(missing_ok=True)


def read_record(folder: Folder, name: str) -> ShardRecord | None:
    """Return the record of a shard that is finished and verifies, else None: redo it."""
    return read_records(folder, [name])[0]


def read_unverified_record(folder: Path, name: str) -> ShardRecord | None:
    """Return the record of a shard whose file has the right size; its bytes are not looked at."""
    record = _record_in(read_notes(folder, name))
    try:
        whole = record is not None and (folder / record.file).stat().st_size == record.num_bytes
    except OSError:
        return None
    return record if whole else None


def read_records(folder: Folder, names: Sequence[str]) -> list[ShardRecord | None]:
    """Return the record of each shard that is finished and verifies, None for each to be redone.

    A file is hashed. Of an object the store is asked (HEAD) for its size and the checksum that was
    stored with it: it cannot be torn, so it need not be fetched.
    """
    records = [_record_in(notes) for notes in all_notes(folder, names)]
    if isinstance(folder, ObjectPath):
        return at_once(partial(_if_whole, folder), records)
    return [_if_whole(folder, record) for record in records]


def _record_in(notes: Mapping[str, Any] | None) -> ShardRecord | None:
    try:
        return None if notes is None else ShardRecord(**notes["record"])
    except (TypeError, KeyError):
        return None


def _if_whole(folder: Folder, record: ShardRecord | None) -> ShardRecord | None:
    if record is None:
        return None
    path = folder / record.file
    if isinstance(path, ObjectPath):
        info = path.info()
        same = info is not None and info.num_bytes == record.num_bytes
        return record if same and info is not None and info.sha256 == record.sha256 else None
    whole = path.is_file() and path.stat().st_size == record.num_bytes
    return record if whole and sha256_of(path) == record.sha256 else None


def read_notes(folder: Folder, name: str) -> dict[str, Any] | None:
    """Return the whole JSON of a shard's record, or None when it is missing or unreadable."""
    return all_notes(folder, [name])[0]


def all_notes(folder: Folder, names: Sequence[str]) -> list[dict[str, Any] | None]:
    """Return what ``read_notes`` does of each shard; from a store, many at once."""
    return [_parsed(text) for text in read_many([folder / f"{name}.json" for name in names])]


def _parsed(text: bytes | None) -> dict[str, Any] | None:
    try:
        body = json.loads(text or b"")
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def count_records(folder: Path) -> int:
    """Return how many shards of a folder have a record: one listing, no file is opened."""
    names = (entry.name for entry in os.scandir(folder)) if folder.is_dir() else ()
    return sum(name.startswith("shard-") and name.endswith(".json") for name in names)


def listed_shards(folder: Path, num_shards: int, suffix: str) -> npt.NDArray[np.bool_]:
    """Return which shards have a file ``<name><suffix>``: one listing, no file is opened."""
    found = np.zeros(num_shards, bool)
    if not folder.is_dir():
        return found
    stem = shard_name(0, num_shards)
    start, end = len("shard-"), stem[stem.index("-of-") :] + suffix
    for entry in os.scandir(folder):
        digits = entry.name.removesuffix(end)[start:]
        if entry.name.endswith(end) and digits.isdecimal() and int(digits) < num_shards:
            found[int(digits)] = True
    return found
