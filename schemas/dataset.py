"""Open finished tables for training: rows at random, joined by ``sample_id``, checked first.

``open_dataset`` is the one door between the cache and any trainer, ours or another. It reads Arrow
shards through a memory map and keeps the last few decompressed record batches; a row costs one
batch (16 rows) of decompression when it is not among them. Rows are joined by ``sample_id``, never
by position; a row that some table lacks (it was rejected there) is left out and counted.

Of a table in an object store the shards are copied into a cache of this machine as they are needed
and checked there; of those for which there is no room, single batches are fetched.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .errors import IdentityMismatch, SchemaMismatch, StoreError
from .open_table import OpenTable, open_table
from .scored_spans import misplaced
from .storage.files import Folder, as_folder
from .storage.shard_cache import local_files
from .tables import teacher_logits

I64Array = npt.NDArray[np.int64]
# Columns that tables about one sample share; any other is one table's alone.
_SHARED = {"sample_id", "prompt_ids_T"}
TEACHERS = "teachers"  # a row's columns of each table of teacher_logits, where there are several


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
    parts = open_tables(folders, split=split, verify=verify)
    refuse_equal_columns(parts)
    return CachedDataset(parts)


def open_tables(
    folders: Sequence[Folder | str], *, split: str | None, verify: bool
) -> list[OpenTable]:
    """Open tables of one tokenizer; raises what ``open_dataset`` does of them one by one."""
    parts = [open_table(as_folder(folder), split=split, verify=verify) for folder in folders]
    first = parts[0]
    for part in parts[1:]:
        if not part.manifest.has_ids_of(first.manifest.tokenizer, first.manifest.vocabulary):
            raise IdentityMismatch(
                f"{part.folder} holds ids of tokenizer {part.manifest.tokenizer[:12]}, "
                f"{first.folder} of {first.manifest.tokenizer[:12]}: make both with one tokenizer"
            )
    return parts


def refuse_equal_columns(parts: "Sequence[OpenTable]") -> None:
    """One of two columns with the same name would hide the other without a word."""
    holder: dict[str, OpenTable] = {}
    for part in parts:
        for name in part.table.columns:
            other = holder.setdefault(name, part)
            if other is not part and name not in _SHARED:
                raise SchemaMismatch(
                    f"{other.folder} and {part.folder} both have a column '{name}', which would "
                    f"hide one another: open one of them"
                )


class CachedDataset:
    """A map-style data set: ``dataset[i]`` is the joined columns of one row, as numpy arrays.

    Of several tables of ``teacher_logits`` a row has the columns of the first, and all of them
    under ``TEACHERS``, a tuple in the order of the tables.
    """

    def __init__(self, parts: "Sequence[OpenTable]") -> None:
        """Join the tables by sample_id, in the order of the first."""
        self.manifests = tuple(part.manifest for part in parts)
        self.folders = tuple(part.folder for part in parts)
        self._parts = tuple(parts)
        names = [manifest.table for manifest in self.manifests]
        found = [place for place, name in enumerate(names) if name == teacher_logits.NAME]
        self._logits = found if len(parts) > 1 else []
        if len(parts) == 1:  # nothing to join: the keys need not be read
            num_rows = parts[0].num_rows
            self._rows, self.num_missing = np.arange(num_rows, dtype=np.int64)[:, None], 0
        else:
            keys = [part.sample_ids() for part in parts]
            for part, own in zip(parts, keys, strict=True):
                _require_distinct(own, part.folder)
            self._rows, self.num_missing = _join(keys)
        if not len(self._rows):
            raise IdentityMismatch(
                f"no row of {parts[0].folder} has a partner in "
                f"{', '.join(map(str, self.folders[1:]))}: were they made from the same input?"
            )

    def __len__(self) -> int:
        """The number of rows that every table has."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the columns of row ``index``, those of later tables added to the first's.

        Raises StoreError for a row that its own bytes, or those of its input, contradict.
        """
        row: dict[str, Any] = {}
        found = [part.row(int(at)) for part, at in zip(self._parts, self._rows[index], strict=True)]
        for place, columns in enumerate(found):
            if place not in self._logits[1:]:
                row.update(columns)
        for place in self._logits:
            if problem := misplaced({**row, **found[place]}):
                part, at = self._parts[place], self._rows[index][place]
                raise StoreError(part.contradicted(int(at), row["sample_id"], problem))
        if len(self._logits) > 1:
            row[TEACHERS] = tuple(found[place] for place in self._logits)
        return row

    @property
    def data_sets(self) -> "tuple[CachedDataset, ...]":
        """The data sets that it is made of, each with its own rows: of tables joined, itself."""
        return (self,)

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


def _require_distinct(keys: npt.NDArray[np.bytes_], folder: Folder) -> None:
    """Raise StoreError for a key that two rows have: which of them joins would be chance."""
    fixed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(keys.itemsize), len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys))]
    )
    if len(fixed.unique()) == len(keys):
        return
    found, counts = np.unique(keys, return_counts=True)
    raise StoreError(
        f"{folder}: {int((counts > 1).sum())} sample_ids stand in several rows, "
        f"{found[counts > 1][0].decode()} is one: delete this folder and run the recipe again"
    )


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
