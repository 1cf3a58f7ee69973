"""Records of finished shards, and the manifest that makes a table complete.

Each shard has a JSON record, written after the shard. From the records come ``shards.feather``, the
list of all shards, and then ``manifest.json``, last: a table is complete when that exists and every
shard of its list verifies. The manifest itself stays small, whatever the number of shards: it has
their totals, and the sha256 of the list. Timings stay in the records, so that equal tables have
byte-identical manifests.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SchemaMismatch, StoreError
from .object_store import Folder, ObjectPath, at_once, read_if_there, read_many
from .shard_list import ShardList, ShardTotals
from .shard_list import ShardRecord as ShardRecord  # people take both from here
from .shard_list import shard_name as shard_name
from .shards import sha256_of, write_text

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A complete table: what it is, what made it, and its shards in order (kept as columns).

    ``identity`` is the whole document whose hash is ``fingerprint``: stage, version, config, model
    and inputs. ``tokenizer`` is the fingerprint of the tokenizer whose ids the table holds.
    """

    table: str
    version: int
    variant: str
    fingerprint: str
    tokenizer: str
    vocab_size: int
    identity: Mapping[str, Any]
    shards: Sequence[ShardRecord]
    source_rejects: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep the shards as columns."""
        if not isinstance(self.shards, ShardList):
            object.__setattr__(self, "shards", ShardList.of(self.shards))

    @property
    def shard_list(self) -> ShardList:
        """The shards, as columns."""
        assert isinstance(self.shards, ShardList)
        return self.shards

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return self.shard_list.totals.num_rows

    @property
    def num_tokens(self) -> int:
        """Input tokens of all shards."""
        return self.shard_list.totals.num_tokens

    @property
    def num_positions(self) -> int:
        """Scored positions of all shards."""
        return self.shard_list.totals.num_positions

    @property
    def num_bytes(self) -> int:
        """Bytes of all Arrow files of rows."""
        return self.shard_list.totals.num_bytes

    @property
    def rejects(self) -> dict[str, int]:
        """Rejected rows by reason, over the source and all shards."""
        total = Counter(self.source_rejects) + Counter(self.shard_list.totals.rejects)
        return dict(sorted(total.items()))

    @property
    def dataset_id(self) -> str:
        """A hash over the shards' checksums in order: equal tables, equal ids, on any machine."""
        digest = hashlib.sha256(self.fingerprint.encode())
        digest.update(self.shard_list.checksums())
        return digest.hexdigest()


_OWN_FIELDS = [item.name for item in fields(Manifest) if item.name != "shards"]


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write the list of shards and then ``manifest.json``: the step's last act."""
    manifest.shard_list.write(folder)
    body = {
        "format": FORMAT,
        "dataset_id": manifest.dataset_id,
        "totals": asdict(manifest.shard_list.totals),
        **{name: getattr(manifest, name) for name in _OWN_FIELDS},
    }
    write_text(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Folder) -> Manifest:
    """Read a complete table's manifest; raises StoreError when there is none or it is damaged.

    The list of shards is opened, and held to the manifest, when a shard is first asked for.
    """
    manifest = manifest_if_there(folder)
    if manifest is None:
        state = "is not finished" if folder.is_dir() else "does not exist"
        raise StoreError(
            f"{folder} {state}: it has no {MANIFEST}; run the recipe that makes it "
            f"(`teachercache run`) and try again"
        )
    return manifest


def manifest_if_there(folder: Folder) -> Manifest | None:
    """Return a table's manifest, None for a table that is not complete: on a store, one GET."""
    path = folder / MANIFEST
    text = read_if_there(path)
    if text is None:
        return None
    try:
        body = json.loads(text)
        if (found := body["format"]) != FORMAT:
            raise SchemaMismatch(
                f"{path} has format {found}, this version reads format {FORMAT}: delete it and "
                f"run the recipe again (finished shards are kept), or use the other version"
            )
        shards = ShardList.in_folder(folder, ShardTotals(**body["totals"]))
        return Manifest(shards=shards, **{name: body[name] for name in _OWN_FIELDS})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): delete it and run the recipe again"
        ) from error


def damaged_shards(folder: Folder, manifest: Manifest) -> list[str]:
    """Return one line for each shard or file that is missing or whose bytes have changed."""
    expected = ((shard.file, shard.sha256) for shard in manifest.shards)
    problems = []
    for name, sha256 in chain(expected, manifest.files.items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif (found := sha256_of(path)) != sha256:
            problems.append(f"{path} has sha256 {found[:12]}, the manifest says {sha256[:12]}")
    return problems


def write_record(folder: Folder, record: ShardRecord, notes: Mapping[str, Any]) -> None:
    """Write a shard's record; ``notes`` (engine, timings, host) are kept but compared by nobody."""
    body = {"record": asdict(record), "notes": dict(notes)}
    write_text(folder / f"{record.name}.json", json.dumps(body, indent=1, sort_keys=True) + "\n")


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
