"""Open finished tables for training: rows at random, joined by ``sample_id``, checked first.

``open_dataset`` is the one door between the cache and any trainer, ours or another. It reads Arrow
shards through a memory map and keeps the last few decompressed record batches; a row costs one
batch (16 rows) of decompression when it is not among them. Rows are joined by ``sample_id``, never
by position; a row that some table lacks (it was rejected there) is left out and counted.

Of a table in an object store the shards are copied into a cache of this machine as they are needed
and checked there; of those for which there is no room, single batches are fetched.
"""

import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .advantages import SUPPORTS
from .candidate_scores import CANDIDATE_SCORES
from .documents import DOCUMENTS
from .episodes import EPISODES
from .errors import IdentityMismatch, SchemaMismatch, StoreError
from .manifest import Manifest, ShardRecord, damaged_shards, read_manifest
from .object_store import Folder, ObjectPath, ObjectStream, as_folder
from .preference_pairs import PREFERENCE_PAIRS
from .response_logprobs import RESPONSE_LOGPROBS
from .responses import RESPONSES
from .shard_cache import HeldFile, hold, local_file, local_files
from .shards import ROWS_PER_BATCH
from .subset_preferences import SUBSET_PREFERENCES
from .table import Table
from .teacher_logits import ENCODINGS

I64Array = npt.NDArray[np.int64]
_KNOWN: tuple[Table[Any], ...] = (
    DOCUMENTS,
    EPISODES,
    SUBSET_PREFERENCES,
    CANDIDATE_SCORES,
    PREFERENCE_PAIRS,
    RESPONSES,
    RESPONSE_LOGPROBS,
    *ENCODINGS.values(),
    *SUPPORTS.values(),
)
TABLES: dict[tuple[str, str], Table[Any]] = {(table.name, table.variant): table for table in _KNOWN}
CACHED_BATCHES = 64
HELD_SHARDS = 4  # copies of shards in an object store that one reader of a table keeps open
FETCHED_AT_ONCE = 4
# Columns that tables about one sample share; any other is one table's alone.
_SHARED = {"sample_id", "prompt_ids_T"}


def open_dataset(
    folders: Sequence[Folder | str], *, split: str | None = None, verify: bool = True
) -> "CachedDataset":
    """Open one or more complete tables as one data set of joined rows.

    ``split`` keeps only that split's shards. ``verify`` re-hashes every shard first (about 1 GB/s);
    pass False where ``teachercache verify`` has just run; shards in an object store are checked as
    they come in, whatever it is. Raises StoreError for an unfinished or
    damaged table, SchemaMismatch for another version or for two tables that share a column,
    IdentityMismatch for another tokenizer.
    """
    parts = [_open_table(as_folder(folder), split=split, verify=verify) for folder in folders]
    first = parts[0]
    for part in parts[1:]:
        if part.manifest.tokenizer != first.manifest.tokenizer:
            raise IdentityMismatch(
                f"{part.folder} holds ids of tokenizer {part.manifest.tokenizer[:12]}, "
                f"{first.folder} of {first.manifest.tokenizer[:12]}: make both with one tokenizer"
            )
    _refuse_equal_columns(parts)
    return CachedDataset(parts)


def _refuse_equal_columns(parts: "Sequence[_OpenTable]") -> None:
    """One of two columns with the same name would hide the other without a word."""
    holder: dict[str, _OpenTable] = {}
    for part in parts:
        for name in part.table.columns:
            other = holder.setdefault(name, part)
            if other is not part and name not in _SHARED:
                raise SchemaMismatch(
                    f"{other.folder} and {part.folder} both have a column '{name}', which would "
                    f"hide one another: open one of them"
                )


class CachedDataset:
    """A map-style data set: ``dataset[i]`` is the joined columns of one row, as numpy arrays."""

    def __init__(self, parts: "Sequence[_OpenTable]") -> None:
        """Join the tables by sample_id, in the order of the first."""
        self.manifests = tuple(part.manifest for part in parts)
        self.folders = tuple(part.folder for part in parts)
        self._parts = tuple(parts)
        if len(parts) == 1:  # nothing to join: the keys need not be read
            num_rows = parts[0].num_rows
            self._rows, self.num_missing = np.arange(num_rows, dtype=np.int64)[:, None], 0
        else:
            self._rows, self.num_missing = _join([part.sample_ids() for part in parts])
        if not len(self._rows):
            raise IdentityMismatch(
                f"no row of {parts[0].folder} has a partner in "
                f"{', '.join(map(str, self.folders[1:]))}: were they made from the same input?"
            )

    def __len__(self) -> int:
        """The number of rows that every table has."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the columns of row ``index``, those of later tables added to the first's."""
        row: dict[str, Any] = {}
        for part, at in zip(self._parts, self._rows[index], strict=True):
            row.update(part.row(int(at)))
        return row

    def local_folder(self, table: int) -> Path:
        """Return a folder on this machine with the files beside the shards of one table."""
        return local_files(self.folders[table], self.manifests[table].files)

    def epoch_order(
        self, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> I64Array:
        """Return this rank's row indices of one epoch, from its ``start``-th on (to resume).

        The permutation depends on ``seed`` and ``epoch`` alone; ranks take every world_size-th row
        of it, so together they see each row once.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        return order[rank::world_size][start:].astype(np.int64)


@dataclass
class _OpenTable:
    """One table's shards: where each row lies, and the record batches read last."""

    folder: Folder
    manifest: Manifest
    table: Table[Any]
    shards: list[ShardRecord]
    first_row: I64Array
    opened_at_s: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self._readers: OrderedDict[int, _Reader] = OrderedDict()
        self._batches: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        fields = ("folder", "manifest", "table", "shards", "first_row", "opened_at_s")
        return {name: getattr(self, name) for name in fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def num_rows(self) -> int:
        """Rows of all shards that were asked for."""
        return sum(shard.num_rows for shard in self.shards)

    def sample_ids(self) -> npt.NDArray[np.bytes_]:
        """All keys, in row order; reads that one column only, from a store several shards at once.

        So opening tables to join them brings in as many of their shards as there is room for.
        """
        if isinstance(self.folder, ObjectPath):
            with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
                return np.concatenate(list(pool.map(self._keys_of, self.shards)))
        return np.concatenate([self._keys_of(shard) for shard in self.shards])

    def _keys_of(self, shard: ShardRecord) -> npt.NDArray[np.bytes_]:
        only_ids = pa.ipc.IpcReadOptions(
            included_fields=[list(self.table.columns).index("sample_id")]
        )
        place, spared = self.folder / shard.file, self.opened_at_s
        with (
            local_file(place, shard.sha256, spare_from_s=spared) as file,
            pa.memory_map(str(file)) as source,
        ):
            column = pa.ipc.open_file(source, options=only_ids).read_all().column(0)
            return np.asarray(column.to_pylist(), dtype="S24")

    def row(self, at: int) -> dict[str, Any]:
        """Return the columns of one row."""
        shard = int(np.searchsorted(self.first_row, at, side="right")) - 1
        batch, offset = divmod(at - int(self.first_row[shard]), ROWS_PER_BATCH)
        return self._batch(shard, batch)[offset]

    def _batch(self, shard: int, batch: int) -> list[dict[str, Any]]:
        key = (shard, batch)
        if key not in self._batches:
            decoded = self._reader(shard).batches.get_batch(batch)
            names = list(self.table.columns)
            columns = [self.table.column_values(decoded, name) for name in names]
            rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
            self._batches[key] = rows
            if len(self._batches) > CACHED_BATCHES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return self._batches[key]

    def _reader(self, shard: int) -> "_Reader":
        if shard not in self._readers:
            self._readers[shard] = self._open(self.shards[shard])
            if isinstance(self.folder, ObjectPath) and len(self._readers) > HELD_SHARDS:
                self._readers.popitem(last=False)[1].close()
        self._readers.move_to_end(shard)
        return self._readers[shard]

    def _open(self, shard: ShardRecord) -> "_Reader":
        place = self.folder / shard.file
        if isinstance(place, Path):
            return _Reader(pa.ipc.open_file(pa.memory_map(str(place))))
        held = hold(place, shard.sha256, spare_from_s=self.opened_at_s)
        if held is None:
            info = place.info()
            if info is None or info.sha256 not in ("", shard.sha256):
                raise StoreError(
                    f"{place} is missing or has changed since its manifest was written: run "
                    f"`teachercache verify` and mend that table first"
                )
            source = pa.PythonFile(ObjectStream(place, shard.num_bytes), mode="r")
            return _Reader(pa.ipc.open_file(source))
        return _Reader(pa.ipc.open_file(pa.memory_map(str(held.path))), held)


@dataclass(frozen=True, slots=True)
class _Reader:
    """An open shard, and the copy that it reads where that is one of an object."""

    batches: pa.ipc.RecordBatchFileReader
    held: HeldFile | None = None

    def close(self) -> None:
        """Let the copy go."""
        if self.held is not None:
            self.held.close()


def _open_table(folder: Folder, *, split: str | None, verify: bool) -> _OpenTable:
    manifest = read_manifest(folder)
    table = known_table(manifest, folder)
    here = isinstance(folder, Path)
    if verify and here and (problems := damaged_shards(folder, manifest)):
        raise StoreError(f"{problems[0]} ({len(problems)} in all): run the recipe again to mend it")
    shards = [shard for shard in manifest.shards if split in (None, shard.split) and shard.num_rows]
    if not shards:
        raise StoreError(f"{folder} has no row in split '{split}'")
    starts = np.cumsum([0, *(shard.num_rows for shard in shards)])[:-1].astype(np.int64)
    return _OpenTable(folder, manifest, table, shards, starts)


def known_table(manifest: Manifest, folder: Folder) -> Table[Any]:
    """Return the declaration of a manifest's table; raises SchemaMismatch for another version."""
    table = TABLES.get((manifest.table, manifest.variant))
    if table is None or table.version != manifest.version:
        known = "none" if table is None else f"version {table.version}"
        raise SchemaMismatch(
            f"{folder} is table {manifest.table} ({manifest.variant or 'plain'}) version "
            f"{manifest.version}, this code reads {known}: make it again or use the other version"
        )
    return table


def _join(keys: Sequence[npt.NDArray[np.bytes_]]) -> tuple[I64Array, int]:
    """Return [rows, tables] positions of the keys all tables have, and how many the first lost."""
    columns = [np.arange(len(keys[0]), dtype=np.int64)]
    kept = np.ones(len(keys[0]), dtype=bool)
    for other in keys[1:]:
        order = np.argsort(other, kind="stable")
        at = np.searchsorted(other, keys[0], sorter=order)
        at = order[np.minimum(at, len(order) - 1)]
        kept &= other[at] == keys[0]
        columns.append(at.astype(np.int64))
    return np.stack(columns, axis=1)[kept], int((~kept).sum())
