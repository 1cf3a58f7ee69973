"""A table is declared once, as a dataclass of annotated fields; all else is derived from it.

From one declaration come the Arrow schema (with dimensions, units and meaning in its metadata),
the writer's codec and the reader's check. Rows hold numpy arrays whose names end in their
dimensions; on disk they are plain Arrow lists, so polars, ``datasets`` and pyarrow read a shard
without this package:

=====  =================================  ==========================
dims   Arrow type                         in memory
=====  =================================  ==========================
``""``  the column's type                 a Python scalar
``P``  ``list<type>``                     1-D array, ragged over rows
``PK`` ``list<fixed_size_list<type>[K]>`` 2-D array [P, K], K fixed
``M3`` ``list<fixed_size_list<type>[3]>`` 2-D array [M, 3]
=====  =================================  ==========================

Token ids take 16 bits where the vocabulary allows it and 32 where it does not, so a table has to
be bound to a vocabulary size (and to K) before it can be written; reading needs no binding.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import accumulate, pairwise
from typing import Annotated, Any, Final, Generic, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .errors import SchemaMismatch

Row = TypeVar("Row")
TOKEN_ID: Final = "token_id"  # a column type: uint16 or uint32, by the size of the vocabulary
TOKEN_ID_HIGH: Final = "token_id_high"  # what lies above the low byte of one: uint8 or uint16
LOG_VOCABULARY: Final = "log_vocabulary"  # a bound: the log of the size of the vocabulary
KEPT: Final = "kept"  # a bound: K, of the columns that have it
ZSTD_LEVEL: Final = 15  # of tables that are small, or made once by a CPU
# Of wide tables that an engine makes: on 16,352 real positions of ``threshold`` 1.2 % more bytes
# than at 15 for a quarter of the time (November 2026); ``top_k`` and ``exact`` get no larger.
CAPTURE_ZSTD_LEVEL: Final = 9
MOST_LOGPROB: Final = 0.01  # of a probability or a product of some: 0, but for rounding


@dataclass(frozen=True, slots=True)
class Column:
    """What one field of a row is: its Arrow element type, meaning, dimensions and unit.

    ``low`` and ``high`` bound its values; without them integers may be any and floats any that are
    finite. ``falling`` values do not rise along the last dimension, ``distinct`` ones do not stand
    twice in it; NaN in an ``unknown`` one stands for a value that nobody knows. What is otherwise
    contradicts the column (``schemas.row_checks``).
    """

    dtype: pa.DataType | str
    doc: str
    dims: str = ""
    unit: str = ""
    low: float | None = None
    high: float | str | None = None
    falling: bool = False
    distinct: bool = False
    unknown: bool = False


def token_id_type(vocab_size: int) -> pa.DataType:
    """Return the narrowest unsigned type that holds every id below ``vocab_size``."""
    return pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()


def token_id_high_type(vocab_size: int) -> pa.DataType:
    """Return the narrowest unsigned type that holds every id below ``vocab_size`` over 256."""
    return pa.uint8() if vocab_size <= 1 << 16 else pa.uint16()


class Table(Generic[Row]):
    """The declaration of one table: its row class, name, version and (if any) variant.

    Shards of it are compressed at ``zstd_level``.
    """

    def __init__(
        self,
        row: type[Row],
        *,
        name: str,
        version: int,
        variant: str = "",
        zstd_level: int = ZSTD_LEVEL,
    ) -> None:
        """Read the columns off the annotated fields of ``row``."""
        self.row = row
        self.name = name
        self.version = version
        self.variant = variant
        self.zstd_level = zstd_level
        hints = get_type_hints(row, include_extras=True)
        self.columns = {field.name: _column_of(hints[field.name]) for field in fields(row)}  # type: ignore[arg-type]

    def bind(
        self, *, vocab_size: int, sizes: Mapping[str, int] | None = None, packed: bool = False
    ) -> "BoundTable[Row]":
        """Fix the token id width and the fixed dimensions (such as ``K``) for writing.

        Shards of ``packed`` tables, ``threshold_tau`` alone, are entropy coded
        (``schemas.packing``).
        """
        return BoundTable(self, vocab_size, dict(sizes or {}), packed=packed)

    def rows(self, batch: pa.RecordBatch) -> Iterator[Row]:
        """Yield the rows of ``batch``; raises SchemaMismatch where its columns are not ours."""
        columns = [self.column_values(batch, name) for name in self.columns]
        for values in zip(*columns, strict=True):
            yield self.row(**dict(zip(self.columns, values, strict=True)))

    def column_values(self, batch: pa.RecordBatch, name: str) -> list[Any]:
        """Return one column of ``batch`` as a list with one scalar or array per row."""
        index = batch.schema.get_field_index(name)
        if index < 0:
            raise SchemaMismatch(
                f"table {self.name} has no column '{name}'; this shard holds "
                f"{', '.join(batch.schema.names)}: it was written by another version"
            )
        return _decode(batch.column(index), self.columns[name])


class BoundTable(Generic[Row]):
    """A table ready to be written: every Arrow type is known."""

    def __init__(
        self, table: Table[Row], vocab_size: int, sizes: dict[str, int], *, packed: bool = False
    ) -> None:
        """Derive the Arrow schema; ``sizes`` maps a fixed dimension letter to its size."""
        self.table = table
        self.vocab_size = vocab_size
        self.sizes = sizes
        self.packed = packed
        metadata = {"table": table.name, "version": str(table.version), "variant": table.variant}
        self.schema = pa.schema(
            [self._field(name, column) for name, column in table.columns.items()],
            metadata=metadata | {"vocab_size": str(vocab_size)},
        )
        self._types = [(field.name, field.type) for field in self.schema]

    def _field(self, name: str, column: Column) -> pa.Field:
        dtype = column.dtype
        if isinstance(dtype, str):
            of_vocabulary = token_id_type if dtype == TOKEN_ID else token_id_high_type
            dtype = of_vocabulary(self.vocab_size)
        for letter in reversed(column.dims[1:]):
            size = int(letter) if letter.isdigit() else self.sizes[letter]
            dtype = pa.list_(pa.field("item", dtype, nullable=False), size)
        if column.dims:
            dtype = pa.list_(pa.field("item", dtype, nullable=False))
        notes = {"doc": column.doc, "dims": column.dims, "unit": column.unit}
        metadata = {key: value for key, value in notes.items() if value}
        return pa.field(name, dtype, nullable=False, metadata=metadata)

    def to_batch(self, rows: Iterable[Row]) -> pa.RecordBatch:
        """Encode rows; a value that does not fit its column raises ValueError, never wraps."""
        kept = list(rows)
        arrays = [
            _encode([getattr(row, name) for row in kept], dtype) for name, dtype in self._types
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def _column_of(hint: Any) -> Column:
    assert get_origin(hint) is Annotated, f"{hint} is not Annotated[..., Column(...)]"
    columns = [value for value in get_args(hint)[1:] if isinstance(value, Column)]
    assert len(columns) == 1, f"{hint} needs exactly one Column"
    return columns[0]


def _encode(values: list[Any], dtype: pa.DataType) -> pa.Array:
    if not pa.types.is_list(dtype):
        return pa.array(values, type=dtype)
    item = dtype.value_type
    flat = np.concatenate(values, axis=None) if values else np.zeros(0)
    child = _narrow(flat, item.value_type if pa.types.is_fixed_size_list(item) else item)
    if pa.types.is_fixed_size_list(item):
        for shape in map(np.shape, values):
            if len(shape) != 2 or shape[1] != item.list_size:
                raise ValueError(f"got shape {shape}, expected [*, {item.list_size}]")
        child = pa.FixedSizeListArray.from_arrays(child, type=item)
    offsets = np.array([*accumulate(map(len, values), initial=0)], np.int32)
    buffers = [None, pa.py_buffer(offsets)]
    return pa.Array.from_buffers(dtype, len(values), buffers, null_count=0, children=[child])


def _narrow(flat_N: npt.NDArray[Any], dtype: pa.DataType) -> pa.Array:
    target, limits = _held_by(dtype)
    if limits and flat_N.size:
        low = 0 if flat_N.dtype.kind == "u" else int(flat_N.min())
        high = int(flat_N.max())
        if low < limits[0] or high > limits[1]:
            raise ValueError(f"values {low}..{high} do not fit {target}: ids would wrap")
    narrowed_N = np.ascontiguousarray(flat_N, dtype=target)
    buffers = [None, pa.py_buffer(narrowed_N)]
    return pa.Array.from_buffers(dtype, len(narrowed_N), buffers, null_count=0)


@cache
def _held_by(dtype: pa.DataType) -> tuple[np.dtype[Any], tuple[int, int] | None]:
    """Return the numpy type of a column's values, and of integers the least and the most."""
    target = np.dtype(dtype.to_pandas_dtype())
    if target.kind not in "ui":
        return target, None
    return target, (int(np.iinfo(target).min), int(np.iinfo(target).max))


def _decode(array: pa.Array, column: Column) -> list[Any]:
    if not column.dims:
        return array.to_pylist()  # type: ignore[no-any-return]
    offsets = array.offsets.to_numpy()
    flat = array.values
    width = 1
    if pa.types.is_fixed_size_list(flat.type):
        width = flat.type.list_size
        values = flat.values.to_numpy(zero_copy_only=False).reshape(-1, width)
    else:
        values = flat.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in pairwise(offsets.tolist())]
