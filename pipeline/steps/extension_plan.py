"""What an extension copies and what is new: found once, written down, kept until it is done."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.executors.copied_rows import KEY, Origins
from pipeline.planning.plan import PlannedStep
from pipeline.state.extension_record import (
    EXTENSION,
    PLAN,
    ExtensionPlan,
    Source,
    read_plan,
    write_plan,
)
from pipeline.steps.predecessors import take_rows
from pipeline.steps.wanted_rows import NOWHERE, WantedRows, rows_of
from schemas.storage.files import Folder, as_folder, atomic_file
from schemas.storage.manifest import Manifest, manifest_if_there, write_manifest
from schemas.storage.records import ShardRecord, shard_name
from schemas.storage.shard_list import ShardList
from schemas.storage.shards import ROWS_PER_BATCH

_KNOWN, INPUT, MADE = "known.feather", "input", "made"


def is_there(folder: Folder) -> bool:
    """Whether an extension was begun: one look, and no listing of a store."""
    return folder.is_dir() if isinstance(folder, Path) else (folder / PLAN).is_file()


def begun(folder: Folder, missing: Sequence[int]) -> ExtensionPlan | None:
    """Return the plan of a killed run, None where there is none or it no longer holds."""
    plan = read_plan(folder)
    for source in () if plan is None else plan.sources:
        there = manifest_if_there(as_folder(source.folder))
        if there is None or there.dataset_id != source.dataset_id:
            return None
    return plan if plan is not None and set(missing) <= set(plan.shards) else None


def planned(
    step: PlannedStep,
    source: Manifest,
    missing: Sequence[int],
    roots: Sequence[Folder],
    *,
    warned: Callable[[str], None],
) -> ExtensionPlan:
    """Find the rows to be copied, gather the others; write both down, the plan last.

    Nothing is written where no table below ``roots`` has a row.
    """
    folder, place = step.place / EXTENSION, step.inputs[0].place
    wanted = WantedRows.of(place, source, missing)
    serving = take_rows(wanted, step, source, roots, warned=warned)
    sources = tuple(
        Source(str(one.folder), one.manifest.fingerprint, one.manifest.dataset_id, count)
        for one, count in serving
    )
    plan = ExtensionPlan(tuple(missing), sources, wanted.num_rows, wanted.num_new)
    if sources:
        _gather(folder / INPUT, source, place, wanted)
        is_known_N = wanted.tables_N != NOWHERE
        columns = (wanted.keys_N, wanted.tables_N, wanted.places_N)
        _write_known(folder / _KNOWN, Origins(*(column[is_known_N] for column in columns)))
        write_plan(folder, plan)
    return plan


def _gather(folder: Folder, source: Manifest, place: Folder, wanted: WantedRows) -> None:
    """Write the new rows of an input as a table, in shards as large as its largest."""
    most = max(shard.num_rows for shard in source.shards)
    num_shards = -(-wanted.num_new // most)
    records: list[ShardRecord] = []
    waiting: list[pa.Table] = []

    def write(least: int) -> None:
        nonlocal waiting
        while (held := sum(map(len, waiting))) >= least and held:
            rows = pa.concat_tables(waiting)
            name = shard_name(len(records), num_shards)
            records.append(_write_shard(folder, name, rows.slice(0, most)))
            waiting = [rows.slice(most)]

    for index, rows_M in wanted.new_rows():
        (shard,) = source.shard_list.at([index])
        waiting.append(rows_of(place, shard).take(pa.array(rows_M)))
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


def _write_known(path: Folder, known: Origins) -> None:
    keys = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(known.keys_N.itemsize), len(known.keys_N), [None, pa.py_buffer(known.keys_N)]
    )
    columns = {"sample_id": keys, "table": known.tables_N, "row": known.rows_N}
    _write_rows(path, pa.table(columns))


def known_rows(folder: Folder) -> Origins:
    """Return the rows to be copied, by key, each with the number of its source and its place."""
    with pa.ipc.open_file(pa.py_buffer((folder / _KNOWN).read_bytes())) as file:
        rows = file.read_all().combine_chunks()
    keys_N = np.frombuffer(rows["sample_id"].chunk(0).buffers()[1], KEY, len(rows))
    return Origins(keys_N, rows["table"].to_numpy(), rows["row"].to_numpy())


def remove(folder: Folder) -> None:
    """Free what an extension needed, first the file that says what is copied."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in ((folder / PLAN), *folder.find()):
        path.unlink()
