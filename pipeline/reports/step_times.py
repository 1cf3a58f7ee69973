"""How long the shards of a table took to make, as their own records say."""

import math
from dataclasses import dataclass

from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest
from schemas.storage.records import all_notes

RECORDS_READ = 1000  # of a table


@dataclass(frozen=True, slots=True)
class MeasuredTime:
    """Seconds of work on some of a table's shards, and what those hold.

    ``seconds`` is None where no record tells any: an import and an extension tell none. Shards that
    are made at once on several workers count each.
    """

    seconds: float | None
    num_rows: int
    num_positions: int
    num_shards: int

    @property
    def positions_per_s(self) -> float | None:
        """Scored positions a second of one worker."""
        return self.num_positions / self.seconds if self.num_positions and self.seconds else None


def measured_time(folder: Folder, manifest: Manifest) -> MeasuredTime:
    """Sum up what the shards' records tell; of many shards, of evenly spaced ones."""
    num_rows, num_positions, num_shards, seconds = 0, 0, 0, 0.0
    every = math.ceil(len(manifest.shards) / RECORDS_READ) or 1
    shards = manifest.shards[::every]
    for shard, notes in zip(shards, all_notes(folder, [s.name for s in shards]), strict=True):
        told = {} if notes is None else notes.get("notes", {})
        # A shard put together of copied rows tells the time of copying.
        told = None if "extended_from" in told else told.get("seconds")
        if isinstance(told, int | float):
            seconds += told
            num_rows += shard.num_rows
            num_positions += shard.num_positions
            num_shards += 1
    return MeasuredTime(seconds if num_shards else None, num_rows, num_positions, num_shards)
