"""Records of finished shards, and the manifest that makes a table complete.

Each shard has a JSON record, written after the shard. ``manifest.json`` is written last, from the
records: a table is complete when it exists and every shard named in it verifies. Timings stay in
the records, so that equal tables have byte-identical manifests.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from .errors import SchemaMismatch, StoreError
from .object_store import Folder, ObjectPath, at_once, read_if_there, read_many
from .shards import sha256_of, write_text

MANIFEST = "manifest.json"
FORMAT = 1


def shard_name(index: int, num_shards: int) -> str:
    """Return the stem that a shard, its record and its rejects share."""
    return f"shard-{index:05d}-of-{num_shards:05d}"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A complete table: what it is, what made it, and its shards in order.

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
    shards: tuple[ShardRecord, ...]
    source_rejects: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Input tokens of all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_positions(self) -> int:
        """Scored positions of all shards."""
        return sum(shard.num_positions for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all Arrow files."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def rejects(self) -> dict[str, int]:
        """Rejected rows by reason, over the source and all shards."""
        total: Counter[str] = Counter(self.source_rejects)
        for shard in self.shards:
            total.update(shard.rejects)
        return dict(sorted(total.items()))

    @property
    def dataset_id(self) -> str:
        """A hash over the shards' checksums in order: equal tables, equal ids, on any machine."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for shard in self.shards:
            digest.update(bytes.fromhex(shard.sha256))
        return digest.hexdigest()


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write ``manifest.json``: the step's last act."""
    body = {"format": FORMAT, "dataset_id": manifest.dataset_id, **asdict(manifest)}
    write_text(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Folder) -> Manifest:
    """Read a complete table's manifest; raises StoreError when there is none or it is damaged."""
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
        found, dataset_id = body.pop("format"), body.pop("dataset_id")
        shards = tuple(ShardRecord(**record) for record in body.pop("shards"))
        manifest = Manifest(shards=shards, **body)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): delete it and run the recipe again"
        ) from error
    if found != FORMAT:
        raise SchemaMismatch(f"{path} has format {found}, this version reads format {FORMAT}")
    if dataset_id != manifest.dataset_id:
        raise StoreError(f"{path} does not hash to its own dataset_id: delete it and run again")
    return manifest


def damaged_shards(folder: Folder, manifest: Manifest) -> list[str]:
    """Return one line for each shard or file that is missing or whose bytes have changed."""
    expected = [(shard.file, shard.sha256) for shard in manifest.shards]
    problems = []
    for name, sha256 in [*expected, *manifest.files.items()]:
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


def total_rejects(records: Sequence[ShardRecord]) -> int:
    """Return how many rows were rejected in these shards."""
    return sum(sum(record.rejects.values()) for record in records)
