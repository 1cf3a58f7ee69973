"""Rows of finished tables as the work of a step: each is looked up by its key, none is computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Where each row is: by key, in order, the number of its table."""

    keys_N: npt.NDArray[np.bytes_]
    tables_N: npt.NDArray[np.int16]

    @classmethod
    def of(cls, found: Mapping[bytes, int]) -> "Origins":
        """Sort them by key."""
        keys_N = np.array(list(found), dtype=KEY)
        order = np.argsort(keys_N)
        tables_N = np.fromiter(found.values(), np.int16, len(found))
        return cls(keys_N[order], tables_N[order])

    def table_of(self, key: bytes) -> int | None:
        """Return the number of a row's table, None for a key that is not there."""
        at = int(np.searchsorted(self.keys_N, np.array(key, KEY)))
        found = at < len(self.keys_N) and self.keys_N[at] == key
        return int(self.tables_N[at]) if found else None


class CopyStage(TableStage):
    """Stands for stage ``like`` where all rows of the step are in ``tables`` or in ``rejects``.

    ``origins`` has the rows that are in one of ``tables``; ``rejects`` those that the work refused,
    by key, with its reason.
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
        find = _finders(self.tables)

        def work(shard: pa.Table) -> Iterator[Any]:
            for sample_id in shard["sample_id"].to_pylist():
                table = self.origins.table_of(sample_id.encode())
                if table is None:
                    reason = self.rejects.get(sample_id)
                    if reason is None:
                        raise StoreError(
                            f"{context.input_folder}: sample {sample_id} was not there when rows "
                            f"to be copied were chosen: run `teachercache extend` again"
                        )
                    yield Rejected(sample_id, reason)
                else:
                    yield find[table](sample_id)

        yield work


def _finders(tables: Sequence[CopiedTable]) -> list[Callable[[str], Any]]:
    return [_finder(table.open()) for table in tables]


def _finder(table: OpenTable) -> Callable[[str], Any]:
    keys_N = table.sample_ids()
    order_N = np.argsort(keys_N)
    sorted_N = keys_N[order_N]

    def find(sample_id: str) -> Any:
        at = int(np.searchsorted(sorted_N, np.array(sample_id.encode(), KEY)))
        return table.table.row(**table.row(int(order_N[at])))

    return find
