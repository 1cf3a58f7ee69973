"""Several data sets as one: the rows of each under its own teachers, or under several at once.

In a list of tables each one of ``ROWS`` begins a data set, and what follows it is about its rows.
With one of them alone the order is free, as in ``open_dataset``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from schemas.dataset import TEACHERS, CachedDataset, open_tables, refuse_equal_columns
from schemas.errors import ConfigError
from schemas.storage.files import Folder
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.documents import DOCUMENTS
from schemas.tables.episodes import EPISODES
from schemas.tables.teacher_logits import NAME as TEACHER_LOGITS

ROWS: tuple[str, ...] = (DOCUMENTS.name, EPISODES.name, CONVERSATIONS.name)
DATA_SET = "data_set"  # which of the data sets a row is of, a column of each row


def data_sets_of(tables: Sequence[str]) -> list[slice]:
    """Return which of the tables, by their names, are one data set each.

    Raises ConfigError where there are several and the first table is not one of rows.
    """
    starts = [place for place, table in enumerate(tables) if table in ROWS]
    if len(starts) < 2:
        return [slice(0, len(tables))]
    if starts[0]:
        raise ConfigError(
            f"data: it begins with {tables[0]} and has {len(starts)} tables of rows (a "
            f"{tables[starts[0]]} first): name each of these before the signals about its rows"
        )
    ends = [*starts[1:], len(tables)]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def open_data_sets(
    folders: Sequence[Folder | str], *, split: str | None = None, verify: bool = True
) -> CachedDataset:
    """Open complete tables as one data set or several; see the module.

    What ``open_dataset`` takes comes back as it does there. Raises what that raises.
    """
    tables = open_tables(folders, split=split, verify=verify)
    places = data_sets_of([table.manifest.table for table in tables])
    found = []
    for place in places:
        own = tables[place]
        teachers = [table for table in own if table.manifest.table == TEACHER_LOGITS]
        refuse_equal_columns([table for table in own if table not in teachers[1:]])
        found.append(CachedDataset(own))
    mixed = any(_num_teachers(dataset) > 1 for dataset in found)
    return SeveralDatasets(found) if mixed or len(found) > 1 else found[0]


def _num_teachers(dataset: CachedDataset) -> int:
    return sum(manifest.table == TEACHER_LOGITS for manifest in dataset.manifests)


class SeveralDatasets(CachedDataset):
    """The rows of each data set, one after the other; ``DATA_SET`` of a row says whose it is.

    Every row has ``TEACHERS``, of one table too. Tables and folders are those of all, in order.
    """

    def __init__(self, data_sets: Sequence[CachedDataset]) -> None:
        """Put them together; they hold ids of one tokenizer."""
        self._data_sets = tuple(data_sets)
        self.manifests = tuple(m for each in data_sets for m in each.manifests)
        self.folders = tuple(folder for each in data_sets for folder in each.folders)
        self.num_missing = sum(each.num_missing for each in data_sets)
        self._ends = np.cumsum([len(each) for each in data_sets])

    @property
    def data_sets(self) -> tuple[CachedDataset, ...]:
        """Each with its own rows."""
        return self._data_sets

    def __len__(self) -> int:
        """The rows of all."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the columns of row ``index``; raises what ``CachedDataset`` does."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        own = self._data_sets[which]
        row = own[index - int(self._ends[which]) + len(own)]
        return {TEACHERS: (row,), **row, DATA_SET: which}

    def local_folder(self, table: int) -> Path:
        """Return a folder on this machine with the files beside the shards of one table."""
        for own in self._data_sets:
            if table < len(own.manifests):
                return own.local_folder(table)
            table -= len(own.manifests)
        raise IndexError(table)
