"""Some rows of a finished table, drawn by a seed: a table of any size costs the same to look at.

Shards are drawn first, then record batches of them, and all rows of those are read. A drawn shard
of this machine is held to its checksum, one in a store as it comes in.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.planning.plan import PlannedStep
from pipeline.state.step_state import finished_manifest
from schemas.errors import StoreError, TeacherCacheError, first_line
from schemas.open_table import OpenTable, known_table
from schemas.storage.files import Folder, sha256_of
from schemas.storage.manifest import Manifest
from schemas.storage.records import ShardRecord
from schemas.storage.shards import ROWS_PER_BATCH

# What reading a table that something is wrong with may raise.
READ_ERRORS = (TeacherCacheError, pa.ArrowException, OSError, ValueError, KeyError)
SEED = 0
SHARDS_READ = 16
BATCHES_READ = 16  # of all shards together: 256 rows


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row, its split, and the row of the input that it is about, where that was found."""

    index: int
    split: str
    row: Any
    source: Any | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """What was read of a table. ``seconds`` is what reading and decoding the rows took."""

    rows: Sequence[SampledRow]
    num_shards: int
    num_rows: int
    seconds: float
    without_source: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether every row of the table is among them."""
        return len(self.rows) == self.num_rows


def sample_rows(step: PlannedStep, manifest: Manifest, source: PlannedStep | None) -> Sample:
    """Read rows of a finished table, and those of ``source``, its input, that they are about.

    Raises StoreError for a drawn shard that is damaged, SchemaMismatch for a table of another
    version. An input that cannot be read leaves the rows without a source, and says why.
    """
    drawn = _drawn_shards(manifest)
    if not drawn:
        return Sample((), 0, manifest.num_rows, 0.0)
    opened = _opened(step.place, manifest, drawn)
    places = _drawn_rows(opened)
    opened.row(int(places[0]))  # opens the files, which a trainer does once
    started = time.perf_counter()
    rows = [opened.table.row(**opened.row(int(at))) for at in places]
    seconds = time.perf_counter() - started
    sources, problem = _sources(
        source, drawn, {row.sample_id for row in rows}, len(manifest.shards)
    )
    starts = _starts(manifest, drawn)
    sampled = []
    for at, row in zip(places.tolist(), rows, strict=True):
        shard = int(np.searchsorted(opened.first_row, at, side="right")) - 1
        index = starts[shard] + at - int(opened.first_row[shard])
        source = sources.get(row.sample_id)
        sampled.append(SampledRow(index, opened.shards[shard].split, row, source))
    return Sample(sampled, len(drawn), manifest.num_rows, seconds, problem)


def _drawn_shards(manifest: Manifest) -> list[int]:
    """Return the indices of some shards with rows, in order, of each split if there are several."""
    filled = np.flatnonzero(manifest.shard_list.numbers("num_rows") > 0)
    if len(filled) > SHARDS_READ:
        heldout = _of_split(manifest, filled, "heldout")
        others = np.setdiff1d(filled, heldout)
        generator = np.random.default_rng(SEED)
        most = (
            SHARDS_READ if not len(heldout) else SHARDS_READ - min(len(heldout), SHARDS_READ // 4)
        )
        drawn = [generator.choice(others, min(most, len(others)), replace=False)]
        if len(heldout):
            left = min(len(heldout), SHARDS_READ - len(drawn[0]))
            drawn.append(generator.choice(heldout, left, replace=False))
        filled = np.sort(np.concatenate(drawn))
    return [int(index) for index in filled]


def _of_split(manifest: Manifest, indices: Any, split: str) -> Any:
    splits = manifest.shard_list.table["split"].take(indices).to_pylist()
    return indices[np.asarray([found == split for found in splits], bool)]


def _opened(folder: Folder, manifest: Manifest, drawn: Sequence[int]) -> OpenTable:
    shards = list(manifest.shard_list.at(drawn))
    for shard in shards:
        _require_whole(folder, shard)
    starts = np.cumsum([0, *(shard.num_rows for shard in shards)])[:-1].astype(np.int64)
    return OpenTable(folder, manifest, known_table(manifest, folder), shards, starts)


def _require_whole(folder: Folder, shard: ShardRecord) -> None:
    file = folder / shard.file
    if not isinstance(file, Path):
        return
    if not file.is_file():
        raise StoreError(f"{file} is missing: `teachercache repair` of its recipe makes it anew")
    if sha256_of(file) != shard.sha256:
        raise StoreError(
            f"{file} has changed since it was written: `teachercache repair` of its recipe makes "
            f"it anew"
        )


def _drawn_rows(opened: OpenTable) -> Any:
    """Return places of rows, all those of the drawn record batches, in order; int64."""
    batches = []
    for first, shard in zip(opened.first_row.tolist(), opened.shards, strict=True):
        stop = first + shard.num_rows
        starts = range(first, stop, ROWS_PER_BATCH)
        batches += [(start, min(start + ROWS_PER_BATCH, stop)) for start in starts]
    if len(batches) > BATCHES_READ:
        chosen = np.random.default_rng(SEED).choice(len(batches), BATCHES_READ, replace=False)
        batches = [batches[int(i)] for i in np.sort(chosen)]
    return np.concatenate([np.arange(start, stop) for start, stop in batches])


def _starts(manifest: Manifest, drawn: Sequence[int]) -> list[int]:
    """Return the number of the first row of each drawn shard, within the whole table."""
    ends = np.cumsum(manifest.shard_list.numbers("num_rows"))
    return [int(ends[index - 1]) if index else 0 for index in drawn]


def _sources(
    source: PlannedStep | None, drawn: Sequence[int], wanted: set[str], num_shards: int
) -> tuple[dict[str, Any], str]:
    """Return the input's rows by ``sample_id``: a map's shards are those of its input, by index."""
    if source is None:
        return {}, ""
    try:
        manifest = finished_manifest(source)
        if manifest is None or len(manifest.shards) != num_shards:
            return {}, f"its input '{source.name}' is not finished, or was cut into other shards"
        filled = [i for i in drawn if manifest.shards[i].num_rows]
        opened = _opened(source.place, manifest, filled)
        keys = {key.decode(): at for at, key in enumerate(opened.sample_ids())}
        found = {
            name: opened.table.row(**opened.row(keys[name])) for name in sorted(wanted & {*keys})
        }
    except READ_ERRORS as error:
        return {}, f"its input '{source.name}' cannot be read: {first_line(error)}"
    return found, ""
