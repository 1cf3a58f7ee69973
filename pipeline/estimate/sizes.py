"""How large a table is, and what a probe found of a step: the few rows, scaled to all of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.estimate.measures import bytes_line
from schemas.storage.manifest import Manifest
from schemas.tables.documents import SPLITS


@dataclass(frozen=True, slots=True)
class Size:
    """What a table comes to, all splits; ``num_heldout`` are its held-out rows."""

    num_rows: int
    num_tokens: int
    num_positions: int
    num_shards: int
    num_heldout: int

    @classmethod
    def of(cls, manifest: Manifest) -> "Size":
        """Return the size of a finished table."""
        heldout = sum(shard.num_rows for shard in manifest.shards if shard.split == SPLITS[1])
        totals = (manifest.num_rows, manifest.num_tokens, manifest.num_positions)
        return cls(*totals, len(manifest.shards), heldout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the probe found of a step: its whole size, and the seconds of one worker."""

    size: Size | None = None
    num_bytes: int | None = None
    start_seconds: float = 0.0
    seconds: float | None = None
    spread: float = 0.0
    found_by: str
    memory: dict[str, int] | None = None


def counts_of(manifest: Manifest) -> dict[str, int]:
    """Return the rows of each split."""
    counts = dict.fromkeys(SPLITS, 0)
    for shard in manifest.shards:
        counts[shard.split] += shard.num_rows
    return counts


def scaled(
    sampled: Size, rows: int, num_rows: int, num_shards: int, counts: Mapping[str, int]
) -> Size:
    """Return the size of the whole table, whose rows are like those of the sample."""
    share = num_rows / max(1, rows)
    tokens, positions = (round(n * share) for n in (sampled.num_tokens, sampled.num_positions))
    return Size(num_rows, tokens, positions, num_shards, counts[SPLITS[1]])


def table_bytes(sample: Manifest, size: Size) -> int:
    """Return the bytes of all shards: each has its own beside those of its tokens."""
    line = bytes_line(sample.shards)
    return round(line.start * size.num_shards + line.slope * size.num_tokens)
