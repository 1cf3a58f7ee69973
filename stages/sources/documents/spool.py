"""A sort on disk: rows with a 128-bit key go in in any order and come out by ranges of the key.

Rows are written in *segments*, one file each. A segment is one record batch per range of the key
space that has rows; so all segments are written once, in order, and each range is read once, out
of all segments. Memory holds one segment or one range, whatever the number of rows: that is the
two passes of an external merge sort, with ranges of a uniform hash in the place of merging.

A segment takes its name when it is complete and on disk, and carries the writer's state (where it
stood in its input, what it has counted). The newest segment is thus the whole progress record:
after a crash the writer goes on from its state, and at most one segment's work is done again.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from schemas.errors import StoreError, first_line
from schemas.storage.files import atomic_file

KEY = ("key_hi", "key_lo")  # uint64 halves of the key, as columns
MAX_RANGES = 4096


def num_ranges(total_bytes: int, range_bytes: int) -> int:
    """Return the power of two, at most 4,096, that gives ranges of about ``range_bytes``."""
    wanted = max(1, -(-total_bytes // range_bytes))
    return min(MAX_RANGES, 1 << (wanted - 1).bit_length())


def key_columns(keys: list[bytes]) -> dict[str, npt.NDArray[np.uint64]]:
    """Split 16-byte keys into the two columns that sort as the bytes do."""
    halves = np.frombuffer(b"".join(keys), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return {name: np.ascontiguousarray(halves[:, i]) for i, name in enumerate(KEY)}


class Spool:
    """A folder of segments over equal ranges of the key, a power of two of them.

    ``state`` is what the newest segment was written with; None before the first.
    """

    def __init__(self, folder: Path, ranges: int) -> None:
        """Open the folder; a spool that has segments keeps its own number of ranges."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ranges = ranges
        self.state: dict[str, Any] | None = None
        self.num_segments = len(list(folder.glob("segment-*.arrow")))
        if self.num_segments:
            with _segment(self._path(self.num_segments - 1)) as reader:
                notes = _notes(reader)
            self.ranges, self.state = notes["num_ranges"], notes["state"]

    def write_segment(self, frame: pl.DataFrame, state: dict[str, Any]) -> None:
        """Append one segment: rows in any order with the key columns, and the writer's state."""
        ordered = frame.sort(KEY, maintain_order=True)
        table = ordered.to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
        present, starts = np.unique(self._ranges_of(ordered[KEY[0]].to_numpy()), return_index=True)
        stops = [*starts[1:].tolist(), ordered.height][: len(starts)]
        notes = {"num_ranges": self.ranges, "ranges": present.tolist(), "state": state}
        schema = table.schema.with_metadata({"spool": json.dumps(notes)})
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            atomic_file(self._path(self.num_segments)) as stream,
            pa.ipc.new_file(stream, schema, options=options) as out,
        ):
            for start, stop in zip(starts.tolist(), stops, strict=True):
                out.write_batch(table.slice(start, stop - start).to_batches()[0])
        self.num_segments += 1
        self.state = state

    def read_ranges(self, start: int, stop: int) -> pl.DataFrame:
        """Return the rows of ranges ``start`` to ``stop``, by segment and then by key.

        Without rows there are no columns either.
        """
        batches: list[pa.RecordBatch] = []
        for number in range(self.num_segments):
            with _segment(self._path(number)) as reader:
                for place, index in enumerate(_notes(reader)["ranges"]):
                    if start <= index < stop:
                        batches.append(reader.get_batch(place))
        if not batches:
            return pl.DataFrame()
        frame = pl.from_arrow(pa.Table.from_batches(batches))
        assert isinstance(frame, pl.DataFrame)
        return frame

    def _path(self, number: int) -> Path:
        return self.folder / f"segment-{number:06d}.arrow"

    def _ranges_of(self, key_hi: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        bits = self.ranges.bit_length() - 1
        return (key_hi >> np.uint64(1)) >> np.uint64(63 - bits)


@contextmanager
def _segment(path: Path) -> Iterator[Any]:
    try:
        with pa.OSFile(str(path)) as stream:
            yield pa.ipc.open_file(stream)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise StoreError(
            f"cannot read {path}: {first_line(error)}; delete the folder {path.parent} and run "
            f"again"
        ) from error


def _notes(reader: Any) -> dict[str, Any]:
    return json.loads(reader.schema.metadata[b"spool"])  # type: ignore[no-any-return]
