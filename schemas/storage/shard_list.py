"""The shards of a table, in order: columns in one small Arrow file, a record made when asked for.

A table may have a million shards. ``manifest.json`` has their totals; the list itself lies beside
it in ``shards.feather``, some 80 bytes a shard, and is opened when somebody asks for a shard.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import StoreError, first_line
from .files import Folder, atomic_file
from .records import ShardRecord, shard_name

SHARD_LIST = "shards.feather"
SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "num_rows": pa.int64(),
        "num_tokens": pa.int64(),
        "num_positions": pa.int64(),
        "num_bytes": pa.int64(),
        "sha256": pa.binary(32),
        "rejects": pa.map_(pa.string(), pa.int64()),
    }
)
SHARDS_AT_ONCE = 4096  # of a list that is walked through, made into records together


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTotals:
    """Sums over the shards of a table, and the sha256 of the file that lists them."""

    num_shards: int
    num_rows: int
    num_tokens: int
    num_positions: int
    num_bytes: int
    rejects: Mapping[str, int]
    shards_sha256: str


class ShardList(Sequence[ShardRecord]):
    """All shards of a table. Of one that was read, only the totals are known until it is used."""

    def __init__(self, totals: ShardTotals, *, path: Folder | None, table: pa.Table | None) -> None:
        """Take the columns, or the path of the file that has them."""
        self.totals = totals
        self._path = path
        self._table = table

    @classmethod
    def of(cls, records: Iterable[ShardRecord]) -> "ShardList":
        """Return the list of these records, in this order; their names have to say it, too."""
        builder = ShardListBuilder()
        for index, record in enumerate(records):
            builder.add(index, record)
        return builder.finish()

    @classmethod
    def of_columns(cls, table: pa.Table) -> "ShardList":
        """Return the list of these columns, in memory."""
        table = table.combine_chunks()
        sha256 = hashlib.sha256(_file_bytes(table)).hexdigest()
        return cls(_totals(table, sha256), path=None, table=table)

    @classmethod
    def in_folder(cls, folder: Folder, totals: ShardTotals) -> "ShardList":
        """Return the list that lies in ``folder``, unopened."""
        return cls(totals, path=folder / SHARD_LIST, table=None)

    def write(self, folder: Folder) -> None:
        """Write ``shards.feather``: equal shards give equal bytes."""
        with atomic_file(folder / SHARD_LIST) as stream:
            stream.write(_file_bytes(self.table))

    @property
    def table(self) -> pa.Table:
        """The columns of ``SCHEMA``, a row a shard; raises StoreError for another file."""
        if self._table is None:
            assert self._path is not None
            self._table = _read(self._path, self.totals)
        return self._table

    def numbers(self, column: str) -> npt.NDArray[np.int64]:
        """Return one of the integer columns, [shards]."""
        return np.asarray(self.table[column].to_numpy())

    def checksums(self) -> bytes:
        """Return the sha256 of all shards, 32 bytes each, in order."""
        return b"".join(self.table["sha256"].to_pylist())

    def __len__(self) -> int:
        """The number of shards."""
        return self.totals.num_shards

    @overload
    def __getitem__(self, index: int) -> ShardRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardRecord]: ...
    def __getitem__(self, index: int | slice) -> ShardRecord | Sequence[ShardRecord]:
        """Make the record of one shard, or of several."""
        if isinstance(index, slice):
            return list(self.at(range(*index.indices(len(self)))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return next(self.at([index % len(self)]))

    def __iter__(self) -> Iterator[ShardRecord]:
        """Make one record after another."""
        return self.at(range(len(self)))

    def at(self, indices: Sequence[int]) -> Iterator[ShardRecord]:
        """Make the records of these shards, one after another."""
        for first in range(0, len(indices), SHARDS_AT_ONCE):
            yield from self._records(indices[first : first + SHARDS_AT_ONCE])

    def __eq__(self, other: object) -> bool:
        """Whether two lists hold equal shards."""
        return isinstance(other, ShardList) and self.totals == other.totals

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the file itself."""
        kept = self._table if self._path is None else None
        return {"totals": self.totals, "_path": self._path, "_table": kept}

    def _records(self, indices: Sequence[int]) -> Iterator[ShardRecord]:
        part = self.table.take(pa.array(indices, pa.int64()))
        columns = [part[name].to_pylist() for name in SCHEMA.names]
        for index, *values in zip(indices, *columns, strict=True):
            split, num_rows, num_tokens, num_positions, num_bytes, sha256, rejects = values
            yield ShardRecord(
                name=shard_name(index, len(self)),
                split=split,
                num_rows=num_rows,
                num_tokens=num_tokens,
                num_positions=num_positions,
                num_bytes=num_bytes,
                sha256=sha256.hex(),
                rejects=dict(rejects),
            )


class ShardListBuilder:
    """Collects records in any order, in columns: a million take some 100 MB."""

    def __init__(self) -> None:
        """Begin with no shard."""
        self._indices: list[int] = []
        self._records: list[ShardRecord] = []
        self._batches: list[pa.RecordBatch] = []
        self._order: list[npt.NDArray[np.int64]] = []

    def add(self, index: int, record: ShardRecord) -> None:
        """Put a shard in its place; a later record of the same shard takes the earlier one's."""
        self._indices.append(index)
        self._records.append(record)
        if len(self._records) == SHARDS_AT_ONCE:
            self._pack()

    def finish(self) -> ShardList:
        """Return the list of all shards from the first to the last; none may be missing."""
        return ShardList.of_columns(self._columns(0))

    def totals(self, shards: range) -> ShardTotals:
        """Return the sums over ``shards``, which are all that was added; none may be missing."""
        return ShardList.of_columns(self._columns(shards.start)).totals

    def _columns(self, first: int) -> pa.Table:
        self._pack()
        table = pa.Table.from_batches(self._batches, SCHEMA)
        order = np.concatenate([np.zeros(0, np.int64), *self._order])
        by_index = np.argsort(order, kind="stable")
        ordered = order[by_index]
        last = np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]
        kept = by_index[last]
        expected = np.arange(first, first + len(kept))
        assert np.array_equal(order[kept], expected), "a shard is missing"
        return table.take(pa.array(kept))

    def _pack(self) -> None:
        columns = {
            name: [getattr(record, name) for record in self._records]
            for name in SCHEMA.names
            if name not in ("sha256", "rejects")
        }
        columns["sha256"] = [bytes.fromhex(record.sha256) for record in self._records]
        columns["rejects"] = [sorted(record.rejects.items()) for record in self._records]
        self._batches.append(pa.RecordBatch.from_pydict(columns, SCHEMA))
        self._order.append(np.asarray(self._indices, np.int64))
        self._indices, self._records = [], []


def _totals(table: pa.Table, sha256: str) -> ShardTotals:
    rejects: Counter[str] = Counter()
    for chunk in table["rejects"].chunks:
        for reason, count in zip(chunk.keys.to_pylist(), chunk.items.to_pylist(), strict=True):
            rejects[reason] += count
    sums = {
        name: int(table[name].to_numpy().sum()) if len(table) else 0
        for name in ("num_rows", "num_tokens", "num_positions", "num_bytes")
    }
    return ShardTotals(
        num_shards=len(table),
        rejects=dict(sorted(rejects.items())),
        shards_sha256=sha256,
        **sums,
    )


def _file_bytes(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as out:
        out.write_table(table)
    return sink.getvalue()


def _read(path: Folder, expected: ShardTotals) -> pa.Table:
    """Read a list whole; raises StoreError where it is not the one that its manifest names."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _not_its_list(path, first_line(error)) from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected.shards_sha256:  # before anything is made of bytes that are not ours
        raise _not_its_list(path, f"sha256 {found[:12]}, not {expected.shards_sha256[:12]}")
    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        totals = _totals(table, found)
    except (OSError, KeyError, AttributeError, pa.ArrowException) as error:
        raise _not_its_list(path, first_line(error)) from error
    if totals != expected:
        raise _not_its_list(path, f"its shards come to {totals}, not {expected}")
    return table


def _not_its_list(path: Folder, why: str) -> StoreError:
    return StoreError(
        f"{path} is not the list of shards that the manifest beside it was written with ({why}): "
        f"delete the manifest and run the recipe again; finished shards are kept"
    )
