"""Record batches of ``threshold_tau`` rows <-> packed ones, which hold the same in fewer bytes.

A packed shard has the columns ``SCHEMA``: keys and row lengths as they are; ``packed``, the rest of
a record batch in one value at its first row, after a checksum of what it gives back; and
``priors``, what all of them are coded under, at the first row of the shard: zstd over a header in
JSON (the plain schema, table shapes) and counts of one byte. All else is empty. Rows read back are
equal bit for bit.

The layout is a shard's own: manifests, schema files and all that reads rows know nothing of it.
"""

import base64
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..distribution import tail_ids
from ..errors import StoreError, first_line
from .coder import Counter, Packer, Unpacker
from .entries import FLOATS, unused_bits, walk
from .priors import Counts, Priors

Array = npt.NDArray[Any]
LAYOUT = 1
_KEY = b"packed_layout"
_ZSTD = pa.Codec("zstd", compression_level=15)
_PER_POSITION = ("num_head_P", "num_tail_P", *FLOATS)
_COUNTED_BY = {
    "head_ids_H": "num_head_P",
    "head_codes_H": "num_head_P",
    "tail_gaps_low_E": "num_tail_P",
    "tail_gaps_high_E": "num_tail_P",
}


def _required(name: str, dtype: pa.DataType) -> pa.Field:
    return pa.field(name, dtype, nullable=False)


SCHEMA = pa.schema(
    [
        _required("sample_id", pa.string()),
        _required("first_target", pa.int32()),
        _required("num_positions", pa.int32()),
        _required("packed", pa.binary()),
        _required("priors", pa.binary()),
    ]
)


class Batches(Protocol):
    """Record batches of an open shard, of either layout."""

    num_record_batches: int

    def get_batch(self, i: int) -> pa.RecordBatch:
        """Return record batch ``i``."""

    def read_all(self) -> pa.Table:
        """Return all of them."""


def open_batches(source: Any) -> Batches:
    """Open a shard; raises StoreError where it is packed and cannot be read here."""
    reader: Batches = pa.ipc.open_file(source)
    metadata = reader.schema.metadata or {}  # type: ignore[attr-defined]
    if _KEY not in metadata:
        return reader
    if metadata[_KEY] != str(LAYOUT).encode():
        raise StoreError(
            f"this shard is in packed layout {metadata[_KEY].decode(errors='replace')}, and layout "
            f"{LAYOUT} is read here: it was written by another version"
        )
    return PackedBatches(reader)


def packed_schema(plain: pa.Schema) -> pa.Schema:
    """Return the schema of a packed shard, with the metadata of the plain one."""
    return SCHEMA.with_metadata({**(plain.metadata or {}), _KEY: str(LAYOUT)})


def pack(batches: Sequence[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of one shard packed; they are counted first, all of them."""
    if not batches:
        return
    schema = batches[0].schema
    flat, unused, priors = counted(batches)
    stored = _stored(schema, priors, unused)
    for batch, columns in zip(batches, flat, strict=True):
        packer = Packer(priors)
        walk(packer, len(columns["num_head_P"]), unused, columns, priors.order)
        num_empty = batch.num_rows - 1
        arrays = [
            *(batch.column(name) for name in ("sample_id", "first_target")),
            pa.array(np.diff(batch.column("num_head_P").offsets.to_numpy()), pa.int32()),
            pa.array([_checksum(batch) + packer.packed(), *[b""] * num_empty], pa.binary()),
            pa.array([stored, *[b""] * num_empty], pa.binary()),
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=packed_schema(schema))
        stored = b""


def counted(
    batches: Sequence[pa.RecordBatch],
) -> tuple[list[dict[str, Array]], dict[str, int], Priors]:
    """Return the flat columns of each record batch of a shard, unused bits of floats, and priors.

    Ids are counted first: the leaves that sampled ids lie in are made of their counts.
    """
    vocab_size = int(batches[0].schema.metadata[b"vocab_size"])
    flat, counts = [_flat(batch) for batch in batches], Counts()
    unused = {name: min(unused_bits(columns[name]) for columns in flat) for name in FLOATS}
    for columns in flat:
        ids_E = columns["tail_ids_E"]
        counts.add("tail_id", np.zeros(len(ids_E), np.int64), ids_E)
    order = Priors(counts.rounded(), vocab_size).order
    for columns in flat:
        walk(Counter(counts), len(columns["num_head_P"]), unused, columns, order)
    return flat, unused, Priors(counts.rounded(), vocab_size)


def _flat(batch: pa.RecordBatch) -> dict[str, Array]:
    names = (*_PER_POSITION, *_COUNTED_BY)
    columns = {name: batch.column(name).values.to_numpy(zero_copy_only=False) for name in names}
    columns["tail_ids_E"] = tail_ids(columns)
    return columns


def _stored(schema: pa.Schema, priors: Priors, unused: Mapping[str, int]) -> bytes:
    header = {
        "schema": base64.b64encode(schema.serialize().to_pybytes()).decode(),
        "unused": dict(unused),
        "shapes": {name: levels.shape for name, levels in priors.levels.items()},
    }
    line = json.dumps(header, sort_keys=True).encode() + b"\n"
    content = line + b"".join(levels.tobytes() for levels in priors.levels.values())
    return len(content).to_bytes(8, "little") + bytes(_ZSTD.compress(content, asbytes=True))


@dataclass(frozen=True, slots=True)
class _Read:
    """What a shard's first row says of all of it."""

    schema: pa.Schema
    unused: dict[str, int]
    priors: Priors


class PackedBatches:
    """Record batches of a packed shard, unpacked as they are asked for."""

    def __init__(self, reader: Any) -> None:
        """Read nothing yet."""
        self._reader = reader
        self.num_record_batches: int = reader.num_record_batches

    def get_batch(self, i: int) -> pa.RecordBatch:
        """Return record batch ``i`` in the plain layout; raises StoreError where it is damaged."""
        batch = self._reader.get_batch(i)
        try:
            return _unpacked(batch, self._read)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise StoreError(
                f"record batch {i} of a packed shard cannot be unpacked: {first_line(error)}; "
                f"`teachercache verify` says which shards are damaged"
            ) from error

    def read_all(self) -> pa.Table:
        """Return all of them; those of no rows have no columns but the packed ones."""
        if not self.num_record_batches:
            return self._reader.read_all()
        return pa.Table.from_batches([*map(self.get_batch, range(self.num_record_batches))])

    @cached_property
    def _read(self) -> _Read:
        stored = self._reader.get_batch(0).column("priors")[0].as_py()
        size = int.from_bytes(stored[:8], "little")
        content = _ZSTD.decompress(stored[8:], decompressed_size=size, asbytes=True)
        line, _, levels = content.partition(b"\n")
        header, start, tables = json.loads(line), 0, {}
        for name, shape in header["shapes"].items():
            end = start + shape[0] * shape[1]
            tables[name] = np.frombuffer(levels[start:end], np.uint8).reshape(shape)
            start = end
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(header["schema"])))
        priors = Priors(tables, int(schema.metadata[b"vocab_size"]))
        return _Read(schema, header["unused"], priors)


def _unpacked(batch: pa.RecordBatch, read: _Read) -> pa.RecordBatch:
    ends_R = np.cumsum(batch.column("num_positions").to_numpy(), dtype=np.int64)
    packed = batch.column("packed")[0].as_py()
    unpacker = Unpacker(read.priors, packed[4:])
    columns = walk(unpacker, int(ends_R[-1]), read.unused, None, read.priors.order)
    unpacker.finish()
    _add_gaps(columns)
    offsets_R = np.concatenate([[0], ends_R])
    arrays = []
    for field in read.schema:
        if field.name in ("sample_id", "first_target"):
            arrays.append(batch.column(field.name))
            continue
        at_R = offsets_R
        if counted_by := _COUNTED_BY.get(field.name):
            at_R = np.concatenate([[0], np.cumsum(columns[counted_by])])[offsets_R]
        arrays.append(_lists(columns[field.name], at_R, field.type))
    made = pa.RecordBatch.from_arrays(arrays, schema=read.schema)
    if _checksum(made) != packed[:4]:
        raise ValueError("its rows are not those that were packed")
    return made


def _checksum(batch: pa.RecordBatch) -> bytes:
    """Return a CRC-32 of all columns that are packed: of other bytes, or another library's."""
    crc = 0
    for name in (*_PER_POSITION, *_COUNTED_BY):
        values = batch.column(name).values.to_numpy(zero_copy_only=False)
        crc = zlib.crc32(np.ascontiguousarray(values).data, crc)
    return crc.to_bytes(4, "little")


def _add_gaps(columns: dict[str, Array]) -> None:
    ids_E, tails_P = columns["tail_ids_E"], columns["num_tail_P"]
    gaps_E = np.diff(ids_E, prepend=0)
    firsts = (np.cumsum(tails_P) - tails_P)[np.flatnonzero(tails_P)]
    gaps_E[firsts] = ids_E[firsts]
    columns["tail_gaps_low_E"], columns["tail_gaps_high_E"] = gaps_E & 255, gaps_E >> 8


def _lists(values: Array, offsets_R: Array, dtype: pa.DataType) -> pa.Array:
    item = dtype.value_type
    values = np.ascontiguousarray(values, np.dtype(item.to_pandas_dtype()))
    child = pa.Array.from_buffers(item, len(values), [None, pa.py_buffer(values)])
    return pa.ListArray.from_arrays(pa.array(offsets_R, pa.int32()), child, type=dtype)
