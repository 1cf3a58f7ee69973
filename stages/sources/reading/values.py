"""Stream raw values out of a source with ``datasets``; nothing is ever read whole.

Lines of jsonl and plain text go through the ``text`` builder decoded as latin-1, which loses no
byte, and are decoded as UTF-8 here, line by line: so a bad byte or a malformed line costs its own
document and not the run, each is known by its number, and no type is guessed from the first rows
(the ``json`` builder infers a schema from its first 10 MB and fails on a later row that differs).
Of compressed files ``datasets`` decodes with the locale's encoding whatever it is asked for (5.2,
``xopen`` drops ``encoding``), so lines of gz, bz2 and xz are read without it; in the others, and in
compressed paragraphs, a bad byte makes the file unreadable.

Cost: reading and decoding jsonl took 4 s for 200 MB (2 shared cores, 2026-11).
"""

import bz2
import glob
import gzip
import locale
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa

from schemas.errors import ConfigError, first_line
from schemas.storage.file_locks import NO_LOCKS
from stages.sources.reading.hub_rows import hub_name, hub_rows
from stages.sources.reading.json_array import array_elements
from stages.sources.reading.lines import field_of, json_object, read_by
from stages.sources.reading.rejects import MalformedRecord
from stages.sources.reading.source import COMPRESSIONS, HubRows, Source, TableFiles, TextFiles

ROWS_PER_READ = 128
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_READ_ERRORS = (OSError, ValueError, EOFError, pa.ArrowException, zlib.error, lzma.LZMAError)
_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TEXT_TYPES: tuple[Callable[[pa.DataType], bool], ...] = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_null,  # of a file in which every value is null
)


@dataclass(frozen=True, slots=True)
class RawRows:
    """Some values as they stood in the source (bytes where not yet decoded), and what follows.

    A value is a MalformedRecord where its row has none. ``numbers`` are those of the rows in the
    file, from 1, ``where`` is the file's name. ``next_row`` counts rows of file number ``file``:
    with both, reading goes on after these rows.
    """

    values: list[object]
    numbers: list[int]
    where: str
    file: int
    next_row: int


def read_rows(source: Source, *, file: int = 0, row: int = 0) -> Iterator[RawRows]:
    """Yield the rows of ``source`` in order, from row ``row`` of file ``file`` on.

    Raises ConfigError for an unreadable file, or a column that a file of columns does not have.
    """
    if isinstance(source, HubRows):
        where = hub_name(source)
        yield from _numbered(_hub_values(source, where), 0, row, where)
        return
    for index, path in enumerate(source.files()):
        if index >= file:
            with readable(str(path), source.kind):
                first_row = row if index == file else 0
                yield from _numbered(_values(source, path), index, first_row, str(path))


def _values(source: TableFiles | TextFiles, path: Path) -> Iterator[list[object]]:
    if isinstance(source, TextFiles):
        yield from _text_values(path, source.sample_by)
    elif source.is_json:
        yield from _json_values(source.kind, path, source.column)
    else:
        yield from _columnar_values(source.kind, path, source.column)


def _numbered(
    groups: Iterator[list[object]], file: int, first_row: int, where: str
) -> Iterator[RawRows]:
    """Drop the rows before ``first_row`` and the rows that are no document (None markers)."""
    row = 0
    for group in groups:
        skipped = min(max(first_row - row, 0), len(group))
        numbers = range(row + 1 + skipped, row + 1 + len(group))
        row += len(group)
        kept = [
            (number, value)
            for number, value in zip(numbers, group[skipped:], strict=True)
            if value is not _NO_DOCUMENT
        ]
        if skipped < len(group):
            values = [value for _, value in kept]
            yield RawRows(values, [number for number, _ in kept], where, file, row)


class _NoDocument:
    """A row that holds no document: a blank line separates, it is not an empty document."""


_NO_DOCUMENT = _NoDocument()


def _text_values(path: Path, sample_by: str) -> Iterator[list[object]]:
    for lines in raw_lines(path, sample_by):
        yield [line if line.strip() else _NO_DOCUMENT for line in lines]


def _json_values(kind: str, path: Path, column: str) -> Iterator[list[object]]:
    for lines in raw_objects(kind, path):
        yield [_field(line, column) if line.strip() else _NO_DOCUMENT for line in lines]


def raw_objects(kind: str, path: Path) -> Iterator[list[bytes]]:
    """Yield the undecoded objects of a file, of ``jsonl`` its lines, in groups.

    Some are blank. Raises ConfigError for a ``json`` file that is no array.
    """
    if kind == "jsonl":
        yield from raw_lines(path, "line")
        return
    _require_honest_name(path)
    if path.suffix in COMPRESSIONS and path.suffix not in _OPENERS:
        raise ConfigError(f"{path}: kind json reads {', '.join(_OPENERS)}: compress it as one")
    with _OPENERS.get(path.suffix, _open)(path) as stream:
        elements = array_elements(stream, path)
        while group := list(islice(elements, ROWS_PER_READ)):
            yield group


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


def _field(line: bytes, column: str) -> object:
    try:
        return field_of(json_object(line), column, "a text")
    except MalformedRecord as error:
        return error


def raw_lines(path: Path, sample_by: str) -> Iterator[list[bytes]]:
    """Yield the undecoded lines (or paragraphs) of a file that may be compressed, in groups."""
    _require_honest_name(path)
    if sample_by == "line" and path.suffix in _OPENERS:
        yield from _decompressed_lines(path)
        return
    compressed = path.suffix in COMPRESSIONS
    encoding = locale.getpreferredencoding(False) if compressed else "latin-1"
    stream = datasets.load_dataset(
        "text",
        data_files=[glob.escape(str(path))],  # unescaped, "a[1].txt" reads as a pattern: no rows
        split="train",
        streaming=True,
        sample_by=sample_by,
        encoding=encoding,
    )
    first = True
    for table in _tables(stream):
        lines = [text.encode(encoding) for text in table.column("text").to_pylist()]
        if first and lines:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
            first = False
        yield lines


def _decompressed_lines(path: Path) -> Iterator[list[bytes]]:
    with _OPENERS[path.suffix](path) as stream:
        first = stream.readline().removeprefix(_BYTE_ORDER_MARK)
        lines = [first] if first else []
        while lines := [*lines, *islice(stream, ROWS_PER_READ - len(lines))]:
            yield [line.rstrip(b"\r\n") for line in lines]
            lines = []


def _require_honest_name(path: Path) -> None:
    """Refuse a compressed file whose name hides it: it would be decoded as something else."""
    with path.open("rb") as stream:
        start = stream.read(6)
    for suffix, magic in COMPRESSIONS.items():
        if start.startswith(magic) and path.suffix != suffix:
            raise ConfigError(f"{path} is compressed, and its name does not say so: add '{suffix}'")


def _columnar_values(kind: str, path: Path, column: str) -> Iterator[list[object]]:
    def load(options: dict[str, Any]) -> Any:
        name = glob.escape(str(path))
        return datasets.load_dataset(
            kind, data_files=[name], split="train", streaming=True, **options
        )

    _require_text(_schema(load({})), column, str(path))
    pushed_down = {"columns": [column], "batch_size": ROWS_PER_READ} if kind == "parquet" else {}
    yield from _column_bytes(load(pushed_down), column)


def _hub_values(source: HubRows, where: str) -> Iterator[list[object]]:
    with readable(where, "hub"), hub_rows(source) as stream:
        _require_text(_schema(stream), source.column, where)
        yield from _column_bytes(stream, source.column)


def _column_bytes(stream: Any, column: str) -> Iterator[list[object]]:
    """Yield undecoded UTF-8: Arrow does not promise that a string column is valid."""
    for table in _tables(stream.select_columns([column])):
        yield table.column(column).cast(pa.large_binary()).to_pylist()


def _tables(stream: Any) -> Iterator[Any]:
    yield from stream.with_format("arrow").iter(batch_size=ROWS_PER_READ)


def _schema(stream: Any) -> pa.Schema:
    """Return the columns of a stream; some only tell with their first rows."""
    if stream.features is not None:
        return stream.features.arrow_schema
    first = next(_tables(stream), None)
    return pa.schema([]) if first is None else first.schema


def _require_text(schema: pa.Schema, column: str, where: str) -> None:
    if column not in schema.names:
        columns = ", ".join(map(repr, schema.names)) or "none"
        raise ConfigError(
            f"{where}: no column '{column}'; it has {columns}{read_by(schema.names, column)}: "
            f"set `source.column` to the one that holds the text"
        )
    dtype = schema.field(column).type
    if not any(is_text(dtype) for is_text in _TEXT_TYPES):
        raise ConfigError(f"{where}: column '{column}' holds {dtype}, expected strings")


@contextmanager
def readable(where: str, kind: str) -> Iterator[None]:
    """Turn a library's failure to read into one line, without its own log lines before it."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except _READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno in NO_LOCKS:
            raise ConfigError(
                f"{where}: `datasets` locks files in {datasets.config.HF_DATASETS_CACHE}, whose "
                f"file system has no file locks ({error.strerror}): set HF_HOME to a folder on a "
                f"disk of this machine"
            ) from error
        raise ConfigError(f"{where}: cannot be read as {kind}: {first_line(error)}") from error
    finally:
        logger.setLevel(level)
