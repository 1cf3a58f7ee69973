"""One finished table, opened: where each row lies, and the record batches that were read last."""

import os
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .errors import ConfigError, SchemaMismatch, StoreError
from .packing.batches import Batches, open_batches
from .row_checks import contradiction_in
from .storage.files import Folder
from .storage.manifest import MANIFEST, Manifest, damaged_shards, read_manifest
from .storage.object_path import ObjectPath
from .storage.records import ShardRecord
from .storage.shard_cache import HeldFile, hold, local_file
from .storage.shards import ROWS_PER_BATCH, rows_of_batch
from .table import Table
from .tables import TABLES

I64Array = npt.NDArray[np.int64]


class ObjectStream:
    """An object to be read here and there, a GET for each read; for pyarrow's PythonFile."""

    def __init__(self, path: ObjectPath, num_bytes: int) -> None:
        """Begin at the first byte."""
        self.path, self.num_bytes = path, num_bytes
        self.position = 0
        self.closed = False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move, as files do."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.num_bytes}[whence]
        self.position = start + offset
        return self.position

    def tell(self) -> int:
        """Return where the next read begins."""
        return self.position

    def read(self, num_bytes: int = -1) -> bytes:
        """Return so many bytes, fewer at the end."""
        stop = self.num_bytes if num_bytes < 0 else self.position + num_bytes
        stop = min(stop, self.num_bytes)
        data = self.path.read_range(self.position, stop) if stop > self.position else b""
        self.position += len(data)
        return data

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def close(self) -> None:
        """Nothing is open between reads."""
        self.closed = True


CACHED_BATCHES = 64
CACHED_BYTES = 256 << 20  # of record batches, decompressed; the one in use may be larger
WIDE_BYTES = 4 << 20  # of a batch of which only the row that is asked for is decoded
OPEN_SHARDS = 64  # of this machine's that one reader of a table keeps open
HELD_SHARDS = 4  # copies of shards in an object store that one reader of a table keeps open
FETCHED_AT_ONCE = 4
_WRITTEN_SO = (
    f"its checksum is right, so it was written like that: delete this shard and the {MANIFEST} "
    f"beside it and run the recipe again"
)


@dataclass(eq=False)  # two openings of a table are two
class OpenTable:
    """One table's shards; another process that is given it opens the files itself."""

    folder: Folder
    manifest: Manifest
    table: Table[Any]
    shards: list[ShardRecord]
    first_row: I64Array
    opened_at_s: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        """Begin with nothing open."""
        self._readers: OrderedDict[int, _Reader] = OrderedDict()
        self._batches: OrderedDict[tuple[int, int], _Batch] = OrderedDict()
        self._sound: set[tuple[int, int]] = set()  # first rows of what has been checked

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is open behind."""
        fields = ("folder", "manifest", "table", "shards", "first_row", "opened_at_s")
        return {name: getattr(self, name) for name in fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin again with nothing open."""
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
        shard = self._shard_of(at)
        batch, offset = divmod(at - int(self.first_row[shard]), ROWS_PER_BATCH)
        found = self._batch(shard, batch)
        if found.rows:
            return found.rows[offset]
        return self._rows(found.content.slice(offset, 1), shard, batch * ROWS_PER_BATCH + offset)[0]

    def contradicted(self, at: int, sample_id: str, problem: str) -> str:
        """Say in one line what is wrong with a row, and where it lies."""
        shard = self._shard_of(at)
        place = self.folder / self.shards[shard].file
        return contradicted(place, at - int(self.first_row[shard]), sample_id, problem)

    def _shard_of(self, at: int) -> int:
        return int(np.searchsorted(self.first_row, at, side="right")) - 1

    def _batch(self, shard: int, batch: int) -> "_Batch":
        key = (shard, batch)
        if key not in self._batches:
            content = self._content(shard, batch)
            is_wide = content.nbytes > WIDE_BYTES
            rows = [] if is_wide else self._rows(content, shard, batch * ROWS_PER_BATCH)
            self._batches[key] = _Batch(content, rows)
            while len(self._batches) > 1 and self._is_over_budget():
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return self._batches[key]

    def _content(self, shard: int, batch: int) -> pa.RecordBatch:
        """Read a record batch, whose size has to be right: rows are found by their place."""
        record, batches = self.shards[shard], self._reader(shard).batches
        expected = rows_of_batch(record.num_rows, batch)
        content = batches.get_batch(batch) if batch < batches.num_record_batches else None
        if content is None or content.num_rows != expected:
            found = "none" if content is None else f"{content.num_rows} rows"
            raise StoreError(
                f"{self.folder / record.file}: record batch {batch} has {found}, expected "
                f"{expected} rows; {_WRITTEN_SO}"
            )
        return content

    def _is_over_budget(self) -> bool:
        num_bytes = sum(batch.content.nbytes for batch in self._batches.values())
        return len(self._batches) > CACHED_BATCHES or num_bytes > CACHED_BYTES

    def _rows(self, content: pa.RecordBatch, shard: int, first: int) -> list[dict[str, Any]]:
        """Decode rows; the first time they are read here, they are held to their own bytes too."""
        names = list(self.table.columns)
        columns = {name: self.table.column_values(content, name) for name in names}
        if (shard, first) not in self._sound:
            size, split = self.manifest.vocab_size, self.shards[shard].split
            found = contradiction_in(content, columns, self.table, size, split)
            if found is not None:
                place, sample_id = self.folder / self.shards[shard].file, columns["sample_id"]
                at = first + found.row
                raise StoreError(contradicted(place, at, sample_id[found.row], found.problem))
            self._sound.add((shard, first))
        return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _reader(self, shard: int) -> "_Reader":
        if shard not in self._readers:
            self._readers[shard] = self._open(self.shards[shard])
            most = HELD_SHARDS if isinstance(self.folder, ObjectPath) else OPEN_SHARDS
            if len(self._readers) > most:  # open files and maps are limited, shards are not
                self._readers.popitem(last=False)[1].close()
        self._readers.move_to_end(shard)
        return self._readers[shard]

    def _open(self, shard: ShardRecord) -> "_Reader":
        place = self.folder / shard.file
        if isinstance(place, Path):
            return _Reader(open_batches(pa.memory_map(str(place))))
        held = hold(place, shard.sha256, spare_from_s=self.opened_at_s)
        if held is None:
            info = place.info()
            if info is None or info.sha256 not in ("", shard.sha256):
                raise StoreError(
                    f"{place} is missing or has changed since its manifest was written: run "
                    f"`teachercache verify` and mend that table first"
                )
            source = pa.PythonFile(ObjectStream(place, shard.num_bytes), mode="r")
            return _Reader(open_batches(source))
        return _Reader(open_batches(pa.memory_map(str(held.path))), held)


@dataclass(frozen=True, slots=True)
class _Batch:
    """A record batch as it lies in memory, and its rows as numpy arrays; none of a wide one."""

    content: pa.RecordBatch
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Reader:
    """An open shard, and the copy that it reads where that is one of an object."""

    batches: Batches
    held: HeldFile | None = None

    def close(self) -> None:
        """Let the copy go."""
        if self.held is not None:
            self.held.close()


def open_table(folder: Folder, *, split: str | None, verify: bool) -> OpenTable:
    """Open a complete table; raises what ``open_dataset`` does of a single one."""
    manifest = read_manifest(folder)
    table = known_table(manifest, folder)
    here = isinstance(folder, Path)
    if verify and here and (problems := damaged_shards(folder, manifest)):
        raise StoreError(
            f"{problems[0]} ({len(problems)} in all): `teachercache repair` of its recipe makes "
            f"what is damaged anew, or delete {folder / MANIFEST} and run the recipe again (the "
            f"rest is kept)"
        )
    shards = [shard for shard in manifest.shards if split in (None, shard.split) and shard.num_rows]
    if not shards:
        raise ConfigError(
            f"{folder} has no row in split '{split}': give the step that reads the text a "
            f"heldout_fraction above 0 (below 1), or more text"
        )
    starts = np.cumsum([0, *(shard.num_rows for shard in shards)])[:-1].astype(np.int64)
    return OpenTable(folder, manifest, table, shards, starts)


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


def contradicted(place: Any, row: int, sample_id: str, problem: str) -> str:
    """Say in one line what is wrong with a row of the shard at ``place``."""
    return f"{place} row {row} (sample {sample_id}): {problem}; {_WRITTEN_SO}"
