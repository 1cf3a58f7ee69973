"""What the bytes of a table say against themselves: every row that is read is held to it.

A checksum tells that a file is the one that was written, not that what was written can be. Checked
here, for ``teachercache verify`` and for whoever reads rows to train:

- Arrow's own structure: list offsets in order and within their values, no nulls, text in UTF-8.
- The bounds of each column: token ids below the table's vocabulary; numbers finite, log-probs at
  most 0, codes and counts within what they count (``Column.low``, ``Column.high``).
- Values in the order they claim (``Column.falling``), kept tokens once each (``Column.distinct``).
- What a row's class asks of its columns together: lengths that agree, spans in order (its own
  ``__post_init__``).
- ``sample_id``, where it is a hash of the row's own token ids: it is computed anew (``hashed_id``).
- ``split``, where rows say theirs: that of their shard.

Bounds are looked at for a whole record batch at once. Of float16 only the bits are: numbers of one
sign lie in the order of their bits, so two maxima tell, where a comparison a value takes ten times
as long. A row class that can tell of a whole batch that its rows are sound says so in
``surely_sound``; rows are looked at one by one where it cannot, to say which is wrong.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .distribution import MAX_MASS_ERROR
from .errors import first_line
from .table import KEPT, LOG_VOCABULARY, TOKEN_ID, Column, Table

Array = npt.NDArray[Any]
Columns = Mapping[str, Sequence[Any]]
_ROUNDED = 1.0 + 1 / 64  # an entropy is stored to 7 significant bits
_COMPARED = 32  # entries of a position that are compared each with each; of more, sorting is faster


class Contradiction(NamedTuple):
    """A row, by its place in the batch, and what is wrong with it."""

    row: int
    problem: str


def contradiction_in(
    batch: pa.RecordBatch,
    columns: Columns,
    table: Table[Any],
    vocab_size: int,
    split: str,
    *,
    thorough: bool = False,
) -> Contradiction | None:
    """Return the first thing that is wrong in ``batch``, None where all rows are sound.

    ``columns`` are its columns as ``Table.column_values`` gives them, ``split`` is what its shard
    is part of. ``thorough`` adds the one check that costs as much as reading: that masses sum to
    one, which decoding for a batch of training finds too.
    """
    try:
        batch.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowIndexError) as error:
        return Contradiction(0, f"torn record batch: {first_line(error)}")
    for name, column in table.columns.items():
        array = batch.column(batch.schema.get_field_index(name))
        if array.null_count:
            return Contradiction(array.is_null().to_pylist().index(True), f"{name} is null")
        found = _outside(columns, name, column, vocab_size)
        if found is not None:
            return found
    for index, found_split in enumerate(columns.get("split", ())):
        if found_split != split:
            return Contradiction(index, f"split is '{found_split}' in a shard of '{split}'")
    return _contradicted_row(columns, table, thorough) or _strange_id(columns, table, vocab_size)


def _strange_id(columns: Columns, table: Table[Any], vocab_size: int) -> Contradiction | None:
    """Return the first row with an id beyond the vocabulary, of ids that no column tells alone."""
    largest_of = getattr(table.row, "largest_id", None)
    if largest_of is None or not len(columns["sample_id"]) or largest_of(columns) < vocab_size:
        return None
    for index in range(len(columns["sample_id"])):
        largest = largest_of({name: values[index : index + 1] for name, values in columns.items()})
        if largest >= vocab_size:
            return Contradiction(
                index, f"a sampled id is {largest}, expected 0 to {vocab_size - 1}"
            )
    return None


def _contradicted_row(columns: Columns, table: Table[Any], thorough: bool) -> Contradiction | None:
    names = list(columns)
    is_hash = hasattr(table.row, "hashed_id")
    is_of_mass = thorough and hasattr(table.row, "mass_P")
    sure = getattr(table.row, "surely_sound", None)
    if sure is not None and not is_of_mass and sure(columns):
        return None
    for index, values in enumerate(zip(*columns.values(), strict=True)):
        try:
            row = table.row(**dict(zip(names, values, strict=True)))
        except ValueError as error:
            return Contradiction(index, str(error).partition(": ")[2] or str(error))
        if is_hash and row.hashed_id != row.sample_id:
            return Contradiction(
                index, f"sample_id does not name its token ids: {row.hashed_id} does"
            )
        if is_of_mass:
            worst = max(row.mass_P, key=lambda mass: abs(mass - 1), default=1.0)
            if not abs(worst - 1) <= MAX_MASS_ERROR:
                return Contradiction(index, f"the mass of a position is {worst:.3f}, not 1")
    return None


def _outside(columns: Columns, name: str, column: Column, vocab_size: int) -> Contradiction | None:
    """Return the first row with a value that is out of bounds or of order."""
    values = columns[name]
    if isinstance(column.dtype, pa.DataType) and not pa.types.is_primitive(column.dtype):
        return None  # text
    low, high = _bounds_of(columns, column, vocab_size)
    flat = np.asarray(values) if not column.dims else _joined(values)
    if not flat.size:
        return None
    lowest, highest = _limits(flat.dtype, low, high)
    if not _surely_inside(flat, lowest, highest):
        for index, value in enumerate(values):
            wide = np.atleast_1d(np.asarray(value)).astype(np.float64)
            bad = ~((wide >= lowest) & (wide <= highest))
            if column.unknown:
                bad &= ~np.isnan(wide)
            if bad.any():
                shown = f"{name} holds {wide[bad][0]:.7g}"
                return Contradiction(index, f"{shown}, expected {lowest:.7g} to {highest:.7g}")
    if column.falling and not _surely_falling(flat):
        for index, value in enumerate(values):
            if (value[:, 1:] > value[:, :-1]).any():
                return Contradiction(index, f"{name} rises where it has to fall")
    if column.distinct and not _surely_distinct(flat):
        for index, value in enumerate(values):
            twice = _twice(value)
            if twice is not None:
                return Contradiction(index, f"{name} holds id {twice} twice at one position")
    return None


def _bounds_of(
    columns: Columns, column: Column, vocab_size: int
) -> tuple[float | None, float | None]:
    if column.dtype == TOKEN_ID:
        return 0, vocab_size - 1
    if column.high == LOG_VOCABULARY:
        return column.low, math.log(vocab_size) * _ROUNDED + 0.01
    if column.high == KEPT:
        widths = [a[0].shape[1] for a in columns.values() if len(a) and np.ndim(a[0]) == 2]
        return column.low, min(widths, default=0)
    assert not isinstance(column.high, str)
    return column.low, column.high


def _joined(values: Sequence[Array]) -> Array:
    """Return the values of all rows: as neighbouring views of one array they lie together."""
    if not len(values):
        return np.zeros(0)
    if len(values) == 1:
        return values[0]
    base: Any = values[0].base
    shape = values[0].shape[1:]
    is_whole = isinstance(base, np.ndarray) and base.size == sum(value.size for value in values)
    return base.reshape(-1, *shape) if is_whole else np.concatenate(values)


def _limits(dtype: Any, low: float | None, high: float | None) -> tuple[float, float]:
    least, most = _range_of(dtype)
    return least if low is None else low, most if high is None else high


@lru_cache
def _range_of(dtype: Any) -> tuple[float, float]:
    if dtype.kind == "b":
        return 0.0, 1.0
    info = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return float(info.min), float(info.max)


def _surely_inside(flat: Array, lowest: float, highest: float) -> bool:
    """Whether no value is outside; False may mean that it takes a closer look."""
    if flat.dtype == np.float16 and flat.flags.c_contiguous:
        bits = flat.view(np.uint16)
        positive = _bits_of(highest) if highest >= 0 else -1
        # Negative numbers come after all positive ones, NaN after either sign's infinity.
        down_to = _bits_of(lowest) if lowest < 0 else positive
        return int(bits.max()) <= down_to and int(bits.view(np.int16).max()) <= positive
    if flat.dtype.kind != "f" and (lowest, highest) == _range_of(flat.dtype):
        return True
    if not flat.max() <= highest:
        return False
    return (flat.dtype.kind in "ub" and lowest <= 0) or bool(flat.min() >= lowest)


@lru_cache
def _bits_of(value: float) -> int:
    return int(np.float16(value).view(np.uint16))


def _surely_falling(flat: Array) -> bool:
    """Whether no float16 of at most 0 is above the one before it, by their bits."""
    if flat.dtype != np.float16 or not flat.flags.c_contiguous:
        return False
    bits = flat.view(np.uint16).reshape(-1)
    in_order = bits[1:] >= bits[:-1]
    in_order[flat.shape[1] - 1 :: flat.shape[1]] = True  # from one position to the next
    return bool(in_order.all())


def _surely_distinct(flat: Array) -> bool:
    """Whether no position [.., K] has a value twice."""
    if flat.shape[1] > _COMPARED:
        ordered = np.sort(flat, axis=1)
        return not bool((ordered[:, 1:] == ordered[:, :-1]).any())
    entries = np.ascontiguousarray(flat.T)  # [K, ..]: comparisons of whole entries are fast
    return not any(bool((entries[k:] == entries[:-k]).any()) for k in range(1, len(entries)))


def _twice(value: Array) -> int | None:
    """Return the first value that stands twice at a position of [P, K]."""
    ordered = np.sort(value, axis=1)
    found = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    return int(found[0]) if found.size else None
