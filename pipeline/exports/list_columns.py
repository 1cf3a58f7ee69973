"""Lists of numpy arrays as Arrow columns of lists, and rows in record batches.

Dimensions: P = entries of a row, K = of each of those.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

ROWS_PER_BATCH = 16

Row = TypeVar("Row")


def lists(arrays: Sequence[npt.NDArray[Any]], value_type: pa.DataType) -> pa.Array:
    """Return a column of lists, or of lists of lists for arrays [P, K] of one K."""
    offsets = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    joined = np.concatenate(arrays)
    values = pa.array(joined.reshape(-1), value_type)
    if joined.ndim == 2:
        inner = np.arange(len(joined) + 1, dtype=np.int32) * joined.shape[1]
        values = pa.ListArray.from_arrays(pa.array(inner, pa.int32()), values)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def ragged_lists(
    counts: Sequence[npt.NDArray[Any]],
    entries: Sequence[npt.NDArray[Any]],
    value_type: pa.DataType,
) -> pa.Array:
    """Return a column of lists of lists: of each row [P] counts, and its entries end to end."""
    outer = np.cumsum([0, *map(len, counts)]).astype(np.int32)
    inner = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
    values = pa.ListArray.from_arrays(
        pa.array(inner.astype(np.int32), pa.int32()), pa.array(np.concatenate(entries), value_type)
    )
    return pa.ListArray.from_arrays(pa.array(outer, pa.int32()), values)


def record_batches(
    rows: Iterable[Row],
    schema: pa.Schema,
    columns_of: Callable[[Sequence[Row]], Sequence[pa.Array | Sequence[Any]]],
) -> Iterator[pa.RecordBatch]:
    """Turn rows into record batches of a few rows each, columns in the order of the schema."""
    left = iter(rows)
    while group := list(islice(left, ROWS_PER_BATCH)):
        columns = [
            column if isinstance(column, pa.Array) else pa.array(column, field.type)
            for column, field in zip(columns_of(group), schema, strict=True)
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
