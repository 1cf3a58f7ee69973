"""Small tables for a probe to read: real shards with a manifest, of a few rows of a table."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from pipeline.executors.shard_task import RowCount, write_output
from pipeline.planning.plan import PlannedStep
from pipeline.steps.table_step import made_by
from schemas.storage.manifest import Manifest, write_manifest
from schemas.storage.records import ShardRecord, shard_name
from schemas.storage.shard_list import ShardList
from schemas.storage.shards import read_verified
from schemas.table import BoundTable
from schemas.tables.documents import SPLITS

_MOST_ROWS, _FEWEST_ROWS = 2048, 16
_SHARDS_READ = 4  # of each split


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a table by split, to be written as a small one."""

    by_split: Mapping[str, Sequence[Any]]

    @property
    def sample_ids(self) -> set[str]:
        """Their keys."""
        return {row.sample_id for rows in self.by_split.values() for row in rows}


def take(rows: Mapping[str, Iterable[Any]], counts: Mapping[str, int], num_tokens: int) -> Rows:
    """Take up to ``num_tokens`` tokens of rows, each split's part of them as it is of all rows."""
    total = sum(counts.values())
    taken: dict[str, list[Any]] = {}
    for split, every in rows.items():
        share = counts[split] / max(1, total)
        taken[split] = list(_within(every, num_tokens * share, _FEWEST_ROWS * share))
    return Rows(taken)


def _within(rows: Iterable[Any], num_tokens: float, fewest: float) -> Iterator[Any]:
    spent = 0
    for index, row in enumerate(islice(rows, _MOST_ROWS)):
        yield row
        spent += row.num_tokens
        if spent >= num_tokens and index + 1 >= fewest:
            return


def rows_of(
    step: PlannedStep, manifest: Manifest, table: Any, keys: Container[str] | None = None
) -> dict[str, Iterator[Any]]:
    """Return readers of a finished table's rows: of shards at even distances, split by split.

    With ``keys`` only rows of these, or made of rows of these.
    """
    readers = {}
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split and shard.num_rows]
        if keys is None:
            shards = shards[:: max(1, len(shards) // _SHARDS_READ)][:_SHARDS_READ]
        readers[split] = _read(step, shards, table, keys)
    return readers


def _read(
    step: PlannedStep, shards: Sequence[ShardRecord], table: Any, keys: Container[str] | None
) -> Iterator[Any]:
    each = -(-_MOST_ROWS // max(1, len(shards)))
    for shard in shards:
        found = read_verified(step.place / shard.file, shard.sha256)
        rows = (row for batch in found.to_batches() for row in table.rows(batch))
        if keys is None:
            yield from islice(rows, each)
        else:
            yield from (
                row
                for row in rows
                if row.sample_id in keys or getattr(row, "source_id", None) in keys
            )


def write_rows(
    step: PlannedStep,
    place: Path,
    bound: BoundTable[Any],
    rows: Rows,
    rows_per_shard: int,
    tokenizer: str,
) -> Manifest:
    """Write the rows as the table of a step, in shards as large as its own will be.

    Where there are too few rows for several of them, in three: a quarter, which an engine warms up
    on, then two of unlike sizes, which tell what a shard takes beside its rows.
    """
    cuts = []
    for split, every in rows.by_split.items():
        ends = _cuts(len(every), rows_per_shard, is_first=split == SPLITS[0])
        cuts += [(split, every[start:end]) for start, end in pairwise(ends) if end > start]
    place.mkdir(parents=True, exist_ok=True)
    records = [
        write_output(
            place,
            shard_name(index, len(cuts)),
            bound,
            RowCount(part),
            split=split,
            made_by=made_by(step),
        )
        for index, (split, part) in enumerate(cuts)
    ]
    manifest = Manifest(
        table=bound.table.name,
        version=bound.table.version,
        variant=bound.table.variant,
        fingerprint=step.fingerprint,
        tokenizer=tokenizer,
        vocabulary=step.vocabulary,
        vocab_size=bound.vocab_size,
        identity=step.identity,
        shards=ShardList.of(records),
    )
    write_manifest(place, manifest)
    return manifest


def _cuts(num_rows: int, rows_per_shard: int, *, is_first: bool) -> list[int]:
    """Return where shards begin and end."""
    if rows_per_shard <= num_rows // 4:
        return [*range(0, num_rows, rows_per_shard), num_rows]
    if not is_first or num_rows < 4:
        return [0, num_rows]
    return [0, num_rows // 4, num_rows // 2, num_rows]
