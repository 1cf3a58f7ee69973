"""Rows of finished tables as the work of a step: each is read from its place, none is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import StoreError
from schemas.open_table import OpenTable, open_table
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest, read_manifest
from schemas.table import BoundTable, Table
from stages.stage import Estimate, Rejected, StageContext, TableStage, Work

KEY = "S24"  # a sample_id


@dataclass(frozen=True, slots=True)
class CopiedTable:
    """A table whose rows may be taken: its folder, and the data set that it held when chosen."""

    folder: Folder
    dataset_id: str

    def open(self) -> OpenTable:
        """Open it; raises StoreError where it has gone or is another one now."""
        if read_manifest(self.folder).dataset_id != self.dataset_id:
            raise StoreError(
                f"{self.folder} has other bytes than when rows of it were chosen to be copied: "
                f"run `teachercache extend` again"
            )
        return open_table(self.folder, split=None, verify=False)


@dataclass(frozen=True, slots=True)
class Origins:
    """Where each row is: by key, in order, the number of its table and its row there."""

    keys_N: npt.NDArray[np.bytes_]
    tables_N: npt.NDArray[np.int16]
    rows_N: npt.NDArray[np.int64]

    def with_table(self, number: int, sample_ids: npt.NDArray[np.bytes_]) -> "Origins":
        """Return these and all rows of one more table, whose keys are given in its order."""
        keys_N = np.concatenate([self.keys_N, sample_ids.astype(KEY)])
        order = np.argsort(keys_N)
        tables_N = np.concatenate([self.tables_N, np.full(len(sample_ids), number, np.int16)])
        rows_N = np.concatenate([self.rows_N, np.arange(len(sample_ids))])
        return Origins(keys_N[order], tables_N[order], rows_N[order])

    def of(self, key: bytes) -> tuple[int, int] | None:
        """Return a row's table and its place there, None for a key that is not there."""
        at = int(np.searchsorted(self.keys_N, np.array(key, KEY)))
        found = at < len(self.keys_N) and self.keys_N[at] == key
        return (int(self.tables_N[at]), int(self.rows_N[at])) if found else None


class CopyStage(TableStage):
    """Stands for stage ``like`` where all rows of the step are in ``tables`` or in ``rejects``.

    ``origins`` are the places of rows in ``tables``; ``rejects`` has what the work refused, by key,
    with its reason.
    """

    VERSION: ClassVar[int] = 1
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = ()

    stage: Literal["copied_rows"] = "copied_rows"
    like: Any
    like_context: Any
    tables: Any
    origins: Any
    rejects: Any

    @property
    def table(self) -> Table[Any]:
        """That of the stage which it stands for."""
        table: Table[Any] = self.like.table
        return table

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """As the stage which it stands for does, with its models."""
        bound: BoundTable[Any] = self.like.bind(self.like_context)
        return bound

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """As the stage which it stands for does."""
        estimate: Estimate = self.like.estimate(source, hidden_size=hidden_size)
        return estimate

    @contextmanager
    def open(self, context: StageContext) -> Iterator[Work]:
        """Open the tables; no model is loaded."""
        tables = [table.open() for table in self.tables]

        def work(shard: pa.Table) -> Iterator[Any]:
            for sample_id in shard["sample_id"].to_pylist():
                place = self.origins.of(sample_id.encode())
                if place is not None:
                    number, row = place
                    yield _row(tables[number], row, sample_id)
                elif sample_id in self.rejects:
                    yield Rejected(sample_id, self.rejects[sample_id])
                else:
                    raise StoreError(
                        f"{context.input_folder}: sample {sample_id} was not there when rows "
                        f"to be copied were chosen: run `teachercache extend` again"
                    )

        yield work


def _row(table: OpenTable, row: int, sample_id: str) -> Any:
    """Return a row of a table; raises StoreError where another one stands there."""
    columns = table.row(row)
    if columns["sample_id"] != sample_id:
        raise StoreError(
            f"{table.folder}: row {row} is sample {columns['sample_id']}, expected {sample_id}: "
            f"delete the folder .extend of the step and run `teachercache extend` again"
        )
    return table.table.row(**columns)
