"""Parquet and Arrow files (IPC files and streams, as ``datasets`` writes them): a list a row."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ConfigError
from stages.sources.token_files.stage import ColumnFiles
from stages.sources.token_files.token_file import Array, Record, readable, unreadable

ROWS_AT_ONCE = 256  # of parquet: what is decoded stays in a core's own memory until it is read
IGNORED = -100  # a label that stands for none
_FILE_MAGIC = b"ARROW1\x00\x00"  # an IPC file is this, then a stream, then a footer


class ColumnFile:
    """One file; raises ConfigError for a missing column, or one of another type."""

    def __init__(self, source: ColumnFiles, path: Path) -> None:
        """Read the footer, or the heads of the record batches."""
        self.source, self.path = source, path
        self._next: tuple[int, Iterator[pa.RecordBatch]] | None = None
        with readable(path, source.kind):
            if source.kind == "parquet":
                found = pq.ParquetFile(path, memory_map=True)
                schema, self.num_rows = found.schema_arrow, found.metadata.num_rows
            else:
                schema, counts = _arrow_batches(path)
                self.num_rows = sum(counts)
        self.num_tokens = path.stat().st_size // 4
        self.columns = [c for c in (source.column, source.mask, source.labels) if c is not None]
        for column in self.columns:
            _require_integers(schema, column, path, may_be_bool=column == source.mask)

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """Yield rows ``start`` to ``stop``.

        A reader goes on where it stopped: parquet and compressed streams are read from the front.
        """
        at, batches = self._next or (0, self._batches())
        if at > start:
            at, batches = 0, self._batches()
        self._next = None
        with readable(self.path, self.source.kind):
            for batch in batches:
                first, last = max(start - at, 0), min(stop - at, batch.num_rows)
                if first < last:
                    yield from self._records(batch.slice(first, last - first))
                if at + batch.num_rows > stop:
                    rest = batch.slice(last)
                    self._next = stop, _chained(rest, batches)
                    return
                at += batch.num_rows
                if at == stop:
                    self._next = at, batches
                    return
        raise ConfigError(f"{self.path}: it has {at:,} rows, its header says {self.num_rows:,}")

    def _batches(self) -> Iterator[pa.RecordBatch]:
        if self.source.kind == "parquet":
            file = pq.ParquetFile(self.path, memory_map=True, pre_buffer=False)
            yield from file.iter_batches(ROWS_AT_ONCE, columns=self.columns, use_threads=False)
            return
        with pa.memory_map(str(self.path)) as mapped:
            if _is_file(self.path):
                reader = pa.ipc.open_file(mapped)
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number).select(self.columns)
            else:
                for batch in pa.ipc.open_stream(mapped):
                    yield batch.select(self.columns)

    def _records(self, batch: pa.RecordBatch) -> Iterator[Record]:
        ids = list(_lists(batch.column(self.source.column), are_ids=True))
        said = self.source.mask or self.source.labels
        others = [None] * len(ids) if said is None else list(_lists(batch.column(said)))
        for ids_T, other_T in zip(ids, others, strict=True):
            if isinstance(ids_T, str):
                yield unreadable(f"{ids_T}_ids")
            elif other_T is None:
                yield Record(ids_T)
            else:
                yield self._scored(ids_T, other_T)

    def _scored(self, ids_T: Array, other_T: "Array | str") -> Record:
        what = "labels" if self.source.mask is None else "mask"
        if isinstance(other_T, str):
            return unreadable(f"{other_T}_{what}")
        if len(other_T) != len(ids_T):
            return unreadable(f"{what}_of_other_length")
        if what == "mask":
            return Record(ids_T, other_T)
        scored_T = other_T != IGNORED
        if (other_T[scored_T] != ids_T[scored_T]).any():
            return unreadable("labels_contradict_ids")
        return Record(ids_T, scored_T)


def _chained(first: pa.RecordBatch, others: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from others


def _lists(column: pa.Array, *, are_ids: bool = False) -> Iterator[Any]:
    """Yield each list as an array; ``missing`` or ``null_in`` for one without a value.

    Of a signed type, ids are given as unsigned ones where none of ``column`` is negative: a look at
    all of them costs less than one at each list.
    """
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.large_list(column.type.value_type))
    values, offsets = column.values, column.offsets.to_numpy()
    missing = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    nulls = None
    if values.null_count:
        nulls = values.is_null().to_numpy(zero_copy_only=False)
        values = values.fill_null(0)
    flat = values.to_numpy(zero_copy_only=False)
    if are_ids and flat.dtype.kind == "i":
        used = flat[offsets[0] : offsets[-1]]
        if len(used) and used.min() >= 0:
            flat = flat.view(f"u{flat.itemsize}")
    for row, (begin, end) in enumerate(
        zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ):
        if missing is not None and missing[row]:
            yield "missing"
        elif nulls is not None and nulls[begin:end].any():
            yield "null_in"
        else:
            yield flat[begin:end]


def _require_integers(schema: pa.Schema, column: str, path: Path, *, may_be_bool: bool) -> None:
    if column not in schema.names:
        columns = ", ".join(map(repr, schema.names)) or "none"
        raise ConfigError(f"{path}: no column '{column}'; it has {columns}")
    dtype = schema.field(column).type
    is_list = any(
        check(dtype)
        for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    )
    is_whole = is_list and pa.types.is_integer(dtype.value_type)
    if not is_whole and not (may_be_bool and is_list and pa.types.is_boolean(dtype.value_type)):
        wanted = "integers or booleans" if may_be_bool else "integers"
        raise ConfigError(f"{path}: column '{column}' holds {dtype}, expected lists of {wanted}")


def _is_file(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_FILE_MAGIC)) == _FILE_MAGIC


def _arrow_batches(path: Path) -> tuple[pa.Schema, Sequence[int]]:
    """Return the schema and the rows of each record batch; of these the heads alone are read."""
    counts = []
    with pa.memory_map(str(path)) as mapped:
        mapped.seek(len(_FILE_MAGIC) if _is_file(path) else 0)
        messages = pa.ipc.MessageReader.open_stream(mapped)
        head = _next(messages)
        if head is None:
            raise ConfigError(f"{path} has no schema: it is empty or cut; write it again")
        schema = pa.ipc.read_schema(head)
        for message in iter(lambda: _next(messages), None):
            if message.type == "record batch":
                counts.append(_rows_of(memoryview(message.metadata)))
    return schema, counts


def _next(messages: Any) -> Any:
    try:
        return messages.read_next_message()
    except StopIteration:
        return None


def _rows_of(head: memoryview) -> int:
    """Return ``length`` of a record batch by its head, a flatbuffer (Arrow's Message.fbs)."""
    message = struct.unpack_from("<I", head, 0)[0]
    header = _place(head, message, 2)
    batch = header + struct.unpack_from("<I", head, header)[0]
    length = _place(head, batch, 0)
    return int(struct.unpack_from("<q", head, length)[0]) if length else 0


def _place(head: memoryview, table: int, field: int) -> int:
    """Return where a field of a flatbuffer's table lies, 0 where it has its default."""
    fields = table - struct.unpack_from("<i", head, table)[0]
    size = struct.unpack_from("<H", head, fields)[0]
    at = 4 + 2 * field
    offset = struct.unpack_from("<H", head, fields + at)[0] if at < size else 0
    return int(table + offset) if offset else 0
