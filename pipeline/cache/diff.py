"""``teachercache diff``: two tables of one kind, by their settings, their rows and their values.

Rows are joined by ``sample_id``, whatever shards they are in: the keys of both tables are held (24
bytes a row), of the rows themselves the record batches in use. Shards of equal checksums are not
read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cache.distances import FIRST, ColumnDifference, decoded, total_variation
from schemas.errors import SchemaMismatch
from schemas.open_table import OpenTable, open_table
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest, read_manifest
from schemas.tables import teacher_logits

_NOTHING = "-"


@dataclass(slots=True)
class Difference:
    """Two tables compared: ids of rows that only one has, and what differs in those of both.

    ``columns`` are those that differ; ``apart`` sums total variation over ``num_positions``.
    """

    settings: list[tuple[str, str, str]]
    only_a: npt.NDArray[np.bytes_]
    only_b: npt.NDArray[np.bytes_]
    num_both: int
    columns: dict[str, ColumnDifference] = field(default_factory=dict)
    num_differing: int = 0
    first: list[str] = field(default_factory=list)
    num_positions: int = 0
    apart: float = 0.0
    most_apart: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether both tables hold the same rows."""
        return not (len(self.only_a) or len(self.only_b) or self.num_differing)


def print_difference(console: Console, a: Folder, b: Folder) -> bool:
    """Compare the tables in two folders and say what differs; return whether a row does."""
    found = difference(a, b)
    for name, folder in (("A", a), ("B", b)):
        _print(console, f"{name}: {folder}")
    if found.settings:
        _print(console, "settings that differ, A | B:")
    for place, one, other in found.settings:
        _print(console, f"  {place}: {one} | {other}")
    _print(
        console,
        f"rows: {found.num_both:,} in both, {len(found.only_a):,} in A alone, "
        f"{len(found.only_b):,} in B alone",
    )
    for name, ids in (("A", found.only_a), ("B", found.only_b)):
        if len(ids):
            _print(console, f"  in {name} alone: {_some([i.decode() for i in ids[: FIRST + 1]])}")
    differing = f"rows of both that differ: {found.num_differing:,} {_some(found.first)}"
    _print(console, differing.rstrip())
    if found.columns:
        console.print(_columns_table(found.columns))
    if found.num_positions:
        _print(
            console,
            f"decoded distributions of these rows: total variation "
            f"{found.apart / found.num_positions:.4f} in the mean, {found.most_apart:.4f} at most, "
            f"over {found.num_positions:,} positions",
        )
    return not found.is_empty


def difference(a: Folder, b: Folder) -> Difference:
    """Compare two finished tables; raises SchemaMismatch for tables of different kinds.

    Raises StoreError for a damaged table, and for a row that its own bytes contradict.
    """
    kinds = [read_manifest(folder).table for folder in (a, b)]
    if kinds[0] != kinds[1]:
        raise SchemaMismatch(f"{a} is table {kinds[0]}, {b} is {kinds[1]}: give two of one kind")
    one, other = (open_table(folder, split=None, verify=True) for folder in (a, b))
    ids_a, ids_b = one.sample_ids(), other.sample_ids()
    found = Difference(
        settings=list(_settings(one.manifest, other.manifest)),
        only_a=np.setdiff1d(ids_a, ids_b),
        only_b=np.setdiff1d(ids_b, ids_a),
        num_both=int(np.isin(ids_a, ids_b).sum()),
    )
    columns = {
        name: ColumnDifference(measures=not isinstance(column.dtype, str))  # else token ids
        for name, column in one.table.columns.items()
        if name in other.table.columns
    }
    for at_a, at_b in _pairs(one, other, ids_a, ids_b):
        _compare(found, columns, one, other, at_a, at_b)
    found.columns = {name: column for name, column in columns.items() if column.num_rows}
    return found


def _pairs(
    one: OpenTable,
    other: OpenTable,
    ids_a: npt.NDArray[np.bytes_],
    ids_b: npt.NDArray[np.bytes_],
) -> Iterator[tuple[int, int]]:
    """Yield where each row of both lies in either table, in the first one's order.

    Rows of a shard that the other table has byte by byte are left out.
    """
    order_b = np.argsort(ids_b, kind="stable")
    sorted_b = ids_b[order_b]
    equal = {shard.sha256 for shard in other.shards}
    for shard, first in zip(one.shards, one.first_row.tolist(), strict=True):
        if shard.sha256 in equal:
            continue
        keys = ids_a[first : first + shard.num_rows]
        at = np.minimum(np.searchsorted(sorted_b, keys), len(sorted_b) - 1)
        for row in np.flatnonzero(sorted_b[at] == keys).tolist():
            yield first + row, int(order_b[at[row]])


def _compare(
    found: Difference,
    columns: Mapping[str, ColumnDifference],
    one: OpenTable,
    other: OpenTable,
    at_a: int,
    at_b: int,
) -> None:
    row_a, row_b = one.row(at_a), other.row(at_b)
    sample_id = row_a["sample_id"]
    differing = [
        column.add(sample_id, row_a[name], row_b[name]) for name, column in columns.items()
    ]
    differs = any(differing)
    if one.manifest.table == teacher_logits.NAME and (
        differs or one.manifest.variant != other.manifest.variant
    ):
        here, there = decoded(row_a, one.manifest.variant), decoded(row_b, other.manifest.variant)
        if here is not None and there is not None and len(here[0]) == len(there[0]):
            apart_P = total_variation(here, there)
            found.num_positions += len(apart_P)
            found.apart += float(apart_P.sum())
            most = float(apart_P.max(initial=0.0))
            found.most_apart = max(found.most_apart, most)
            differs = differs or most > 0
    if differs:
        found.num_differing += 1
        if len(found.first) <= FIRST:
            found.first.append(sample_id)


def _settings(a: Manifest, b: Manifest) -> Iterator[tuple[str, str, str]]:
    """Yield place and both values of each setting, input and model that differs."""
    one, other = dict(_flat(_body(a))), dict(_flat(_body(b)))
    for place in sorted(one.keys() | other.keys()):
        values = one.get(place, _NOTHING), other.get(place, _NOTHING)
        if values[0] != values[1]:
            yield place, *values


def _body(manifest: Manifest) -> Mapping[str, Any]:
    names = ("tokenizer", "vocabulary", "vocab_size")
    return {**manifest.identity, **{name: getattr(manifest, name) for name in names}}


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _flat(part, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list) and value:
        for index, part in enumerate(value):
            yield from _flat(part, f"{place}[{index}]")
    else:
        yield place, json.dumps(value)


def _columns_table(columns: Mapping[str, ColumnDifference]) -> Table:
    headers = ("column", "rows", "of other lengths", "most apart", "mean apart", "first rows")
    table = Table(*headers, box=SIMPLE)
    for name, column in columns.items():
        numbers = (column.most, column.mean) if column.num_values else (None, None)
        cells = (
            name,
            f"{column.num_rows:,}",
            f"{column.num_reshaped:,}",
            *("-" if number is None else f"{number:.4g}" for number in numbers),
            "\n".join(column.first),
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _some(ids: list[str]) -> str:
    more = " ..." if len(ids) > FIRST else ""
    return f"({', '.join(ids[:FIRST])}{more})" if ids else ""


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
