"""Rows of one key in several shards: the first of them stays, the others are left out.

A table holds a ``sample_id`` once, and shards that are made each by itself cannot see another's
rows. So when all are there their keys are read (24 bytes a row are held), and each shard that
repeats a row of an earlier one is written again without it. Which row is the first depends on the
shards' order alone, and it is never left out: a run that is killed on the way ends with the same
bytes when it is run again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np

from pipeline.executors.shard_task import RowCount, write_output
from schemas.open_table import OpenTable
from schemas.storage.files import Folder, read_if_there
from schemas.storage.manifest import Manifest
from schemas.storage.records import ShardRecord
from schemas.storage.shard_cache import local_file
from schemas.storage.shard_list import ShardList
from schemas.storage.shards import FAST_ZSTD_LEVEL, read_shard
from schemas.table import BoundTable
from stages.stage import Rejected

REPEATED = "duplicate_of_earlier_shard"


def without_repeated(
    folder: Folder,
    bound: BoundTable[Any],
    shards: ShardList,
    *,
    made_by: Mapping[str, Any],
    said: Callable[[str], None],
) -> ShardList:
    """Return the shards with each key once; writes those again that repeat an earlier one's."""
    if not shards.totals.num_rows:
        return shards
    records = list(shards)
    first_row = np.cumsum([0, *(record.num_rows for record in records)])
    keys = _keys(folder, bound, shards, [r for r in records if r.num_rows])
    is_repeated = np.ones(len(keys), bool)
    is_repeated[np.unique(keys, return_index=True)[1]] = False
    found = 0
    for index, record in enumerate(records):
        rows = np.flatnonzero(is_repeated[first_row[index] : first_row[index + 1]])
        if len(rows):
            records[index] = _rewritten(folder, bound, record, set(rows.tolist()), made_by)
            found += len(rows)
    if found:
        said(f"{found:,} rows of earlier shards left out of later ones")
    return ShardList.of(records)


def _keys(
    folder: Folder, bound: BoundTable[Any], shards: ShardList, records: list[ShardRecord]
) -> Any:
    table = bound.table
    manifest = Manifest(
        table=table.name,
        version=table.version,
        variant=table.variant,
        fingerprint="",
        tokenizer="",
        vocab_size=bound.vocab_size,
        identity={},
        shards=shards,
    )
    starts = np.zeros(len(records), np.int64)  # keys alone are read
    return OpenTable(folder, manifest, table, records, starts).sample_ids()


def _rewritten(
    folder: Folder,
    bound: BoundTable[Any],
    record: ShardRecord,
    repeated: set[int],
    made_by: Mapping[str, Any],
) -> ShardRecord:
    with local_file(folder / record.file, record.sha256) as file:
        shard = read_shard(file)
        every = (row for batch in shard.to_batches() for row in bound.table.rows(batch))
        kept = (
            Rejected(row.sample_id, REPEATED) if at in repeated else row
            for at, row in enumerate(every)
        )
        rows = RowCount(chain(_rejected_before(folder, record), kept))
        return write_output(
            folder,
            record.name,
            bound,
            rows,
            split=record.split,
            made_by=made_by,
            zstd_level=FAST_ZSTD_LEVEL,
        )


def _rejected_before(folder: Folder, record: ShardRecord) -> Iterator[Rejected]:
    """Yield what was rejected when the shard was made."""
    if record.rejects:
        text = read_if_there(folder / f"{record.name}.rejects.jsonl") or b""
        yield from (Rejected(**json.loads(line)) for line in text.splitlines())
