"""What rounding the states of an ``exact`` table cost it, by the records of its shards."""

from collections.abc import Sequence
from dataclasses import dataclass

from schemas.storage.files import Folder
from schemas.storage.records import all_notes

ROUNDING_KL = "rounding_kl"  # of a record's notes: the mean over the shard's positions
MOST_RECORDS = 64  # that are read


@dataclass(frozen=True, slots=True)
class RoundingCost:
    """The mean KL(p || p') in nats, as it was measured on each row, over some shards."""

    kl: float
    num_positions: int
    num_shards: int

    def __str__(self) -> str:
        """Say it in a few words."""
        return (
            f"states rounded at a KL of {self.kl:.2g} nats, the mean over "
            f"{self.num_positions:,} positions of {self.num_shards} shards"
        )


def read_rounding_cost(folder: Folder, names: Sequence[str]) -> RoundingCost | None:
    """Return the cost by the records of the first 64 of these shards that have one.

    None where no record says it: of another encoding, or in a table that was fetched without them.
    """
    total, positions, shards = 0.0, 0, 0
    for body in filter(None, all_notes(folder, names[:MOST_RECORDS])):
        kl = body.get("notes", {}).get(ROUNDING_KL)
        count = body.get("record", {}).get("num_positions", 0)
        if isinstance(kl, float):
            total += kl * count
            positions += count
            shards += 1
    return RoundingCost(total / positions, positions, shards) if positions else None
