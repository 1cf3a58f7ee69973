"""What a source has ready once the heavy work is done: shards of known size, and counts."""

from dataclasses import dataclass

from schemas.tables.documents import SPLITS

PREPARED = "prepared.json"  # written last: where it is, everything it speaks of is on the disk


@dataclass(frozen=True, slots=True)
class SourceShard:
    """One shard to be: its split (``train`` or ``heldout``) and its number of rows."""

    split: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedShards:
    """What any source hands on: all shards, train before held-out, and what was left out and why.

    ``rejects`` counts by reason; ``rejected`` has ``place``, ``reason`` and ``detail`` of the
    first records of each reason that a record can have.
    """

    shards: tuple[SourceShard, ...]
    rejects: dict[str, int]
    rejected: tuple[dict[str, str], ...] = ()


def cut_shards(rows: dict[str, int], rows_per_shard: int) -> tuple[SourceShard, ...]:
    """Return shards of ``rows_per_shard`` rows, the last of each split with what is left."""
    return tuple(
        SourceShard(split, min(rows_per_shard, rows[split] - start))
        for split in SPLITS
        for start in range(0, rows[split], rows_per_shard)
    )


def within(rows: dict[str, int], max_rows: int | None) -> dict[str, int]:
    """Return how many rows of each split to keep, in the proportion they are there, rounded down.

    Rows come in the order of a hash, so the first ones are a sample of all.
    """
    total = sum(rows.values())
    if max_rows is None or total <= max_rows:
        return rows
    return {
        split: max(1, count * max_rows // total) if count else 0 for split, count in rows.items()
    }
