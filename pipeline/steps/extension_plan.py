"""What an extension copies and what is new: found once, written down, kept until it is done."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.planning.plan import PlannedStep
from pipeline.steps.predecessors import Predecessor, digests_of
from schemas.errors import StoreError
from schemas.open_table import known_table
from schemas.storage.files import Folder, as_folder, atomic_file, read_if_there, write_text
from schemas.storage.manifest import Manifest, manifest_if_there, write_manifest
from schemas.storage.records import ShardRecord, shard_name
from schemas.storage.shard_list import ShardList
from schemas.storage.shards import ROWS_PER_BATCH, read_verified

EXTENSION = ".extend"
_PLAN, _KNOWN, INPUT, MADE = "plan.json", "known.feather", "input", "made"


@dataclass(frozen=True, slots=True)
class Source:
    """A predecessor, and how many of the step's rows are copied of it."""

    folder: str
    fingerprint: str
    dataset_id: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class ExtensionPlan:
    """What is to be copied and what is new; ``shards`` are those of the step it is about."""

    shards: tuple[int, ...]
    sources: tuple[Source, ...]
    num_rows: int
    num_new: int

    @property
    def num_copied(self) -> int:
        """Rows of the step that lie in a source."""
        return sum(source.num_rows for source in self.sources)


def is_there(folder: Folder) -> bool:
    """Whether an extension was begun: one look, and no listing of a store."""
    return folder.is_dir() if isinstance(folder, Path) else (folder / _PLAN).is_file()


def begun(folder: Folder, missing: Sequence[int]) -> ExtensionPlan | None:
    """Return the plan of a killed run, None where there is none or it no longer holds."""
    text = read_if_there(folder / _PLAN)
    if text is None:
        return None
    try:
        body = json.loads(text)
        sources = tuple(Source(**source) for source in body["sources"])
        plan = ExtensionPlan(tuple(body["shards"]), sources, body["num_rows"], body["num_new"])
    except (ValueError, TypeError, KeyError):
        return None
    for source in plan.sources:
        there = manifest_if_there(as_folder(source.folder))
        if there is None or there.dataset_id != source.dataset_id:
            return None
    return plan if set(missing) <= set(plan.shards) else None


def planned(
    step: PlannedStep, source: Manifest, missing: Sequence[int], found: Sequence[Predecessor]
) -> ExtensionPlan:
    """Find the rows to be copied, gather the others; write both down, the plan last."""
    folder, place = step.place / EXTENSION, step.inputs[0].place
    known: dict[bytes, tuple[bytes, int]] = {}
    for number, one in enumerate(found):
        for key, digest in one.rows():
            known.setdefault(key, (digest, number))
    origins: dict[bytes, int] = {}
    new: set[bytes] = set()
    new_rows: dict[int, list[int]] = {}  # of each input shard
    num_rows = 0
    table = known_table(source, place)
    for index, shard in zip(missing, source.shard_list.at(missing), strict=True):
        num_rows += shard.num_rows
        for row, (key, digest) in enumerate(digests_of(_rows_of(place, shard), table)):
            there = known.get(key)
            if there is not None and there[0] == digest:
                origins[key] = there[1]
            elif key not in new:
                new.add(key)
                new_rows.setdefault(index, []).append(row)
    if both := new & origins.keys():
        raise StoreError(
            f"{place}: sample {min(both).decode()} stands there twice with other columns: "
            f"delete that folder and run the recipe again"
        )
    numbers = list(origins.values())
    counts = np.bincount(np.array(numbers, np.int64), minlength=len(found)).tolist()
    sources = tuple(
        Source(str(one.folder), one.manifest.fingerprint, one.manifest.dataset_id, count)
        for one, count in zip(found, counts, strict=True)
    )
    plan = ExtensionPlan(tuple(missing), sources, num_rows, len(new))
    if plan.num_copied:
        _gather(folder / INPUT, source, place, new_rows)
        columns = {"sample_id": pa.array(list(origins), pa.binary()), "table": numbers}
        _write_rows(folder / _KNOWN, pa.table(columns))
        write_text(folder / _PLAN, json.dumps(asdict(plan), sort_keys=True) + "\n")
    return plan


def _rows_of(place: Folder, shard: ShardRecord) -> pa.Table:
    return read_verified(place / shard.file, shard.sha256)


def _gather(
    folder: Folder, source: Manifest, place: Folder, rows: Mapping[int, Sequence[int]]
) -> None:
    """Write some rows of an input as a table, in shards as large as its largest."""
    num_rows = sum(map(len, rows.values()))
    most = max(shard.num_rows for shard in source.shards)
    num_shards = -(-num_rows // most)
    records: list[ShardRecord] = []
    waiting: list[pa.Table] = []

    def write(least: int) -> None:
        nonlocal waiting
        while (held := sum(map(len, waiting))) >= least and held:
            rows = pa.concat_tables(waiting)
            name = shard_name(len(records), num_shards)
            records.append(_write_shard(folder, name, rows.slice(0, most)))
            waiting = [rows.slice(most)]

    for shard, indices in zip(source.shard_list.at(list(rows)), rows.values(), strict=True):
        waiting.append(_rows_of(place, shard).take(pa.array(indices)))
        write(most)
    write(1)
    write_manifest(folder, replace(source, shards=ShardList.of(records), files={}))


def _write_shard(folder: Folder, name: str, rows: pa.Table) -> ShardRecord:
    path = folder / f"{name}.arrow"
    num_bytes, sha256 = _write_rows(path, rows)
    return ShardRecord(
        name=name,
        split="train",  # of no account: no signal reads it
        num_rows=len(rows),
        num_tokens=0,
        num_positions=0,
        num_bytes=num_bytes,
        sha256=sha256,
    )


def _write_rows(path: Folder, rows: pa.Table) -> tuple[int, str]:
    """Write a file of rows; return its size and checksum."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as out:
        out.write_table(rows.combine_chunks(), max_chunksize=ROWS_PER_BATCH)
    data = sink.getvalue().to_pybytes()
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        stream.write(data)
    return len(data), hashlib.sha256(data).hexdigest()


def known_rows(folder: Folder) -> dict[bytes, int]:
    """Return the rows to be copied, by key, each with the number of its source."""
    with pa.ipc.open_file(pa.py_buffer((folder / _KNOWN).read_bytes())) as file:
        rows = file.read_all()
    return dict(zip(rows["sample_id"].to_pylist(), rows["table"].to_pylist(), strict=True))


def remove(folder: Folder) -> None:
    """Free what an extension needed, first the file that says what is copied."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in ((folder / _PLAN), *folder.find()):
        path.unlink()
