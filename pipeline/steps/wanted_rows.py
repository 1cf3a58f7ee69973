"""The distinct rows of some input shards, by key: which of them finished tables have, and where.

Held as arrays: a million rows take 50 MB, and 170 at the most with what sorting and looking up
take. What a finished table has is asked for with its own input in hand, one shard at a time, and
its keys, 24 bytes a row, so a root full of earlier tables takes no more.

Dimensions: N = distinct rows, in the order of their keys, R = rows of one shard.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.executors.copied_rows import KEY
from schemas.errors import StoreError
from schemas.open_table import known_table
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest
from schemas.storage.records import ShardRecord
from schemas.storage.shards import read_verified
from schemas.table import Table

I64Array = npt.NDArray[np.int64]
NOWHERE = -1


@dataclass(slots=True)
class WantedRows:
    """``shards_N`` and ``rows_N`` say where a row of the input lies first.

    ``tables_N`` is the number of the finished table that has it, NOWHERE for none, and ``places_N``
    its row there. ``num_rows`` counts all rows of the shards.
    """

    keys_N: npt.NDArray[np.bytes_]
    digests_N: npt.NDArray[np.uint64]
    shards_N: npt.NDArray[np.int32]
    rows_N: npt.NDArray[np.int32]
    tables_N: npt.NDArray[np.int16]
    places_N: I64Array
    num_rows: int

    @classmethod
    def of(cls, place: Folder, source: Manifest, shards: Sequence[int]) -> "WantedRows":
        """Read some shards of a finished input.

        Raises StoreError where one key names rows that differ.
        """
        parts: list[tuple[npt.NDArray[Any], ...]] = []
        records = source.shard_list.at(shards)
        for index, record in zip(shards, records, strict=True):
            rows = rows_of(place, record)
            rows_R = np.arange(len(rows), dtype=np.int32)
            digests_R = digests_of(rows, known_table(source, place))
            parts.append((keys_of(rows), digests_R, np.full_like(rows_R, index), rows_R))
        return cls._sorted(place, parts)

    @classmethod
    def _sorted(cls, place: Folder, parts: list[tuple[npt.NDArray[Any], ...]]) -> "WantedRows":
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        parts.clear()  # half the memory
        order = np.argsort(columns[0], kind="stable")
        keys, digests = (column[order] for column in columns[:2])
        is_again = keys[1:] == keys[:-1]
        differs = np.flatnonzero(is_again & (digests[1:] != digests[:-1]))
        if len(differs):
            raise StoreError(
                f"{place}: sample {keys[differs[0]].decode()} stands there twice with other "
                f"columns: delete that folder and run the recipe again"
            )
        first = order[np.concatenate([np.ones(min(len(keys), 1), bool), ~is_again])]
        nowhere = np.full(len(first), NOWHERE, np.int16)
        places = np.zeros(len(first), np.int64)
        keys_N, digests_N, shards_N, rows_N = (column[first] for column in columns)
        return cls(keys_N, digests_N, shards_N, rows_N, nowhere, places, len(keys))

    @property
    def num_new(self) -> int:
        """Distinct rows that no table has."""
        return int((self.tables_N == NOWHERE).sum())

    def matching(self, place: Folder, source: Manifest) -> I64Array:
        """Return which of the rows that no table has yet stand, column by column, in an input.

        ``source`` is the manifest of that other input, at ``place``; a shard without any such key
        is not decoded.
        """
        found = []
        table = known_table(source, place)
        if not len(self.keys_N):
            return np.empty(0, np.int64)
        for record in source.shards:
            rows = rows_of(place, record)
            keys_R = keys_of(rows)
            at_R = np.minimum(np.searchsorted(self.keys_N, keys_R), len(self.keys_N) - 1)
            is_asked_R = (self.keys_N[at_R] == keys_R) & (self.tables_N[at_R] == NOWHERE)
            if is_asked_R.any():
                at_M = at_R[is_asked_R]
                digests_M = digests_of(rows.filter(pa.array(is_asked_R)), table)
                found.append(at_M[digests_M == self.digests_N[at_M]])
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)

    def take(self, at_M: I64Array, table: int, sample_ids: npt.NDArray[np.bytes_]) -> int:
        """Note that of the rows ``at_M`` a table has those with a key in ``sample_ids``.

        ``sample_ids`` are its keys in the order of its rows; returns how many that are.
        """
        order = np.argsort(sample_ids)
        keys_M = self.keys_N[at_M]
        nearest_M = np.minimum(
            np.searchsorted(sample_ids, keys_M, sorter=order), len(sample_ids) - 1
        )
        places_M = order[nearest_M]
        is_there_M = sample_ids[places_M] == keys_M
        self.tables_N[at_M[is_there_M]] = table
        self.places_N[at_M[is_there_M]] = places_M[is_there_M]
        return int(is_there_M.sum())

    def new_rows(self) -> Iterator[tuple[int, I64Array]]:
        """Yield each shard of the input that has rows that no table has, and these, in order."""
        new = np.flatnonzero(self.tables_N == NOWHERE)
        order = np.lexsort((self.rows_N[new], self.shards_N[new]))
        shards, rows = self.shards_N[new][order], self.rows_N[new][order].astype(np.int64)
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        for start, part in zip(starts, np.split(rows, starts[1:]), strict=False):
            yield int(shards[start]), part


def rows_of(place: Folder, shard: ShardRecord) -> pa.Table:
    """Return the rows of a shard; raises StoreError where its bytes have changed."""
    return read_verified(place / shard.file, shard.sha256)


def keys_of(rows: pa.Table) -> npt.NDArray[np.bytes_]:
    """Return the keys [R] of some rows."""
    return np.array(rows["sample_id"].to_pylist(), dtype=KEY)


def digests_of(rows: pa.Table, table: Table[Any]) -> npt.NDArray[np.uint64]:
    """Return a digest [R] of each row, of all columns but its key and ``split``, which none reads.

    64 bits: a row whose key is the same and whose columns are others passes once in 2^64.
    """
    names = [name for name in table.columns if name not in ("sample_id", "split")]
    found: list[int] = []
    for batch in rows.to_batches():
        columns = [table.column_values(batch, name) for name in names]
        found.extend(map(_digest, zip(*columns, strict=True)))
    return np.array(found, np.uint64)


def _digest(values: Sequence[Any]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        array = isinstance(value, np.ndarray)
        shown = f"{value.dtype.str}{value.shape}" if array else repr(value)
        digest.update(f"{len(shown)}:{shown}".encode())
        if array:
            digest.update(np.ascontiguousarray(value).tobytes())
    return int.from_bytes(digest.digest(), "little")
