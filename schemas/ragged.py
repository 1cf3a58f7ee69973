"""Entries of all positions of a row, end to end: whether they are as many as counted, and distinct.

Dimensions: P = positions of a row, E = entries of all of them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def surely_counted(counts: Sequence[Array], stored: Sequence[Array]) -> bool:
    """Whether every row of a record batch, none without positions, has as many as it counts."""
    starts = np.cumsum([0, *map(len, counts)])[:-1]
    num_entries = np.add.reduceat(np.concatenate(counts), starts, dtype=np.int64)
    return bool(num_entries.tolist() == [*map(len, stored)])


def id_twice(positions_E: Array, ids_E: Array) -> int | None:
    """Return an id that stands twice at one position, if there is one."""
    keys_E = np.sort((positions_E << 32) + ids_E.astype(np.int64))  # an id has 32 bits
    twice_E = keys_E[1:] == keys_E[:-1]
    return int(keys_E[1:][twice_E][0]) & 0xFFFFFFFF if twice_E.any() else None
