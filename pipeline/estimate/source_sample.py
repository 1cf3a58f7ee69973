"""A bounded sample of a source's files: pieces at even distances, in two halves of a known share.

Each half is a source of the same settings over files of its own; so each can be prepared by the
stage's own code, and how far the two are apart says how sure the extrapolation is.
"""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.sources.reading.source import COMPRESSIONS, RowFiles, TextFiles

HALF_BYTES = 4 << 20  # of files, in each half
_PIECES = 8  # of each half
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True, slots=True)
class SourceSample:
    """Sources over parts of the files, and which share of the whole each of them is."""

    sources: tuple[Any, Any]
    shares: tuple[float, float]
    num_bytes: int  # of all files
    counted_by: str  # what the shares are of: bytes or rows


def sample_of(source: Any, folder: Path) -> SourceSample | None:
    """Write both halves below ``folder``; None where the source is read whole.

    That is a small one, a data set of the hub (it is fetched whole anyway), one JSON array, or
    files of a compression that cannot be read in part.
    """
    if not isinstance(source, RowFiles | TextFiles) or source.kind == "json":
        return None
    files = source.files()
    num_bytes = sum(file.stat().st_size for file in files)
    if num_bytes <= 2 * HALF_BYTES:
        return None
    by_block = isinstance(source, TextFiles) and source.sample_by == "paragraph"
    gap = b"\n\n" if by_block else b"\n"
    unread = set(COMPRESSIONS) - set(_OPENERS)
    if source.kind in ("parquet", "arrow"):
        halves = _rows(files, folder, source.kind)
    elif isinstance(source, TextFiles) and source.sample_by == "document":
        halves = _documents(files, num_bytes)
    elif any(file.suffix in COMPRESSIONS for file in files):
        if by_block or any(file.suffix in unread for file in files):
            return None
        halves = _beginnings(files, folder, num_bytes)
    else:
        halves = _pieces(files, folder, num_bytes, gap)
    if halves is None:
        return None
    (one, one_share), (other, other_share) = halves
    sources = tuple(
        source.model_copy(update={"paths": tuple(map(_escaped, paths))}) for paths in (one, other)
    )
    counted_by = "rows" if source.kind in ("parquet", "arrow") else "bytes"
    return SourceSample((sources[0], sources[1]), (one_share, other_share), num_bytes, counted_by)


_Half = tuple[Sequence[Path], float]  # files, and the share of the whole that they hold
_Halves = tuple[_Half, _Half] | None


def _escaped(path: Path) -> str:
    """Return a pattern of exactly one file."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in str(path))


def _pieces(files: Sequence[Path], folder: Path, num_bytes: int, gap: bytes) -> _Halves:
    """Cut pieces of whole records out of all files, end to end, at even distances."""
    starts = [num_bytes * piece // (2 * _PIECES) for piece in range(2 * _PIECES)]
    halves = []
    for half in range(2):
        path, taken = folder / f"half-{half}{files[0].suffix}", 0
        with path.open("wb") as sink:
            for start in starts[half::2]:
                piece = _piece(files, start, HALF_BYTES // _PIECES, gap)
                taken += len(piece)
                sink.write(piece if piece.endswith(gap) else piece + gap)
        halves.append(([path], taken / num_bytes))
    return halves[0], halves[1]


def _piece(files: Sequence[Path], start: int, size: int, gap: bytes) -> bytes:
    """Return whole records from behind ``start`` on, of the one file that it falls into."""
    for file in files:
        length = file.stat().st_size
        if start < length:
            break
        start -= length
    with file.open("rb") as stream:
        stream.seek(start)
        found = stream.read(size)
        if len(found) == size:
            found += stream.readline()  # a record that is longer than a piece, to its end
    first = found.find(gap) + len(gap) if start and gap in found else 0
    last = found.rfind(gap) + len(gap) if gap in found else len(found)
    is_end = start + len(found) >= length
    return found[first:] if is_end else found[first : max(first, last)]


def _documents(files: Sequence[Path], num_bytes: int) -> _Halves:
    """Take whole files, evenly spread; each is one document."""
    count = max(1, round(len(files) * HALF_BYTES / num_bytes))
    if len(files) < 4 * count:
        return None
    step = len(files) / (2 * count)
    chosen = [files[int(index * step)] for index in range(2 * count)]
    one, other = chosen[::2], chosen[1::2]
    shares = [sum(file.stat().st_size for file in half) / num_bytes for half in (one, other)]
    return (one, shares[0]), (other, shares[1])


def _beginnings(files: Sequence[Path], folder: Path, num_bytes: int) -> _Halves:
    """Read the first lines of evenly spread files; the share is of bytes as they lie there."""
    chosen = files[:: max(1, len(files) // _PIECES)][:_PIECES]
    paths = [folder / f"half-{half}.txt" for half in range(2)]
    shares = [0.0, 0.0]
    for path in paths:
        path.touch()
    for file in chosen:
        with file.open("rb") as raw:
            stream = _OPENERS[file.suffix](raw) if file.suffix in _OPENERS else raw
            lines = list(_first_lines(stream, 2 * HALF_BYTES // len(chosen)))
            share = min(raw.tell(), file.stat().st_size) / num_bytes
        for half, path in enumerate(paths):
            with path.open("ab") as sink:
                sink.writelines(lines[half::2])
            shares[half] += share / 2
    return ([paths[0]], shares[0]), ([paths[1]], shares[1])


def _first_lines(stream: Any, num_bytes: int) -> Iterator[bytes]:
    taken = 0
    for line in stream:
        yield line if line.endswith(b"\n") else line + b"\n"
        taken += len(line)
        if taken >= num_bytes:
            return


def _rows(files: Sequence[Path], folder: Path, kind: str) -> _Halves:
    """Take rows of evenly spread groups or batches; their number is known of the whole."""
    groups = [group for file in files for group in _groups(file, kind)]
    total = sum(rows for rows, _ in groups)
    if total < 4 * _PIECES:
        return None
    step = max(1, len(groups) // (2 * _PIECES))
    chosen = groups[::step][: 2 * _PIECES]
    parts = [list(_batch_rows(read(), HALF_BYTES // _PIECES)) for _, read in chosen]
    halves = []
    for half in range(2):
        tables = [part for found in parts for part in found[half::2]]
        if not tables:
            return None
        table = pa.concat_tables(tables, promote_options="permissive")
        path = folder / f"half-{half}.parquet"
        if kind == "arrow":
            path = path.with_suffix(".arrow")
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        else:
            pq.write_table(table, path)
        halves.append(([path], len(table) / total))
    return halves[0], halves[1]


def _groups(file: Path, kind: str) -> Iterator[tuple[int, Any]]:
    """Yield each group of rows: how many they are, and what reads them."""
    if kind == "parquet":
        opened = pq.ParquetFile(file)
        for index in range(opened.num_row_groups):
            rows = opened.metadata.row_group(index).num_rows
            yield rows, lambda f=opened, i=index: f.read_row_group(i)
        return
    with pa.memory_map(str(file)) as source:
        try:
            stream: Any = pa.ipc.open_stream(source)
            batches = list(stream)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(source)
            batches = [opened.get_batch(index) for index in range(opened.num_record_batches)]
    for batch in batches:
        yield batch.num_rows, lambda b=batch: pa.Table.from_batches([b])


def _batch_rows(table: pa.Table, num_bytes: int) -> Iterator[pa.Table]:
    """Yield two parts of a group's first rows, of about that many bytes each."""
    rows = len(table)
    most = max(1, int(rows * min(1.0, num_bytes / max(1, table.nbytes))))
    most = min(most, rows // 2)
    for start in islice(range(0, rows, max(1, most)), 2):
        if most:
            yield table.slice(start, most)
