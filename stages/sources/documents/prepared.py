"""Text that is prepared: what became of every document, and the rows of each shard.

``prepared.json`` is written last: where it exists, everything it speaks of is on the disk.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from schemas.errors import StoreError
from schemas.storage.files import write_text
from schemas.tables.documents import SPLITS, Document
from stages.sources.documents.sequences import range_path, read_sequences
from stages.sources.prepared import PREPARED, PreparedShards, SourceShard

TRAIN = SPLITS[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSource(PreparedShards):
    """All shards to be, with what became of every document that was read.

    In ``rejects``, ``duplicate_sequence`` and ``packing_remainder`` count rows, all
    others documents; those of ``control_tokens_kept`` and ``control_tokens_split`` were kept, as
    ``truncated`` ones were, which were cut to the row length. ``rows_by_range`` counts, for each
    split, the rows of each file of rows.
    """

    documents_read: int
    truncated: int
    rows_by_range: dict[str, tuple[int, ...]]


def write_prepared(work_dir: Path, prepared: PreparedSource) -> None:
    """Mark ``work_dir`` as complete."""
    write_text(work_dir / PREPARED, json.dumps(asdict(prepared), indent=1) + "\n")


def read_prepared(work_dir: Path) -> PreparedSource | None:
    """Return what was prepared in ``work_dir``; None where that is not complete."""
    path = work_dir / PREPARED
    if not path.is_file():
        return None
    body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    shards = tuple(SourceShard(**shard) for shard in body.pop("shards"))
    rows_by_range = {name: tuple(rows) for name, rows in body.pop("rows_by_range").items()}
    rejected = tuple(body.pop("rejected"))
    return PreparedSource(shards=shards, rows_by_range=rows_by_range, rejected=rejected, **body)


def read_shard_rows(work_dir: Path, index: int) -> Iterator[Document]:
    """Yield the rows of one shard, in order; raises StoreError where nothing is prepared."""
    try:
        stat = (work_dir / PREPARED).stat()
    except FileNotFoundError as error:
        raise StoreError(f"{work_dir} holds no complete ingest: run the recipe again") from error
    prepared, first_rows = _opened(work_dir, stat.st_ino, stat.st_mtime_ns)
    shard, start = prepared.shards[index], first_rows[index]
    stop = start + shard.rows
    for number, held in enumerate(prepared.rows_by_range[shard.split]):
        first, last = max(start, 0), min(stop, held)
        if first < last:
            before = 0 if shard.split == TRAIN else prepared.rows_by_range[TRAIN][number]
            yield from read_sequences(range_path(work_dir, number), before + first, before + last)
        start, stop = start - held, stop - held


@lru_cache(maxsize=1)
def _opened(work_dir: Path, inode: int, mtime_ns: int) -> tuple[PreparedSource, list[int]]:
    """Read what was prepared once for all its shards, and count each one's first row in its split.

    A million shards take 2.5 s to read; ``inode`` and ``mtime_ns`` tell one list from another.
    """
    prepared = read_prepared(work_dir)
    assert prepared is not None, "it was there a moment ago"
    next_row: Counter[str] = Counter()
    first_rows = []
    for shard in prepared.shards:
        first_rows.append(next_row[shard.split])
        next_row[shard.split] += shard.rows
    return prepared, first_rows
