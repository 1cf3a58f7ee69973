"""The files of a peer's data: Parquet, or what ``datasets.save_to_disk`` writes, by split."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ConfigError, StoreError, first_line
from stages.sources.reading.rejects import MalformedRecord

Array = npt.NDArray[Any]
HELDOUT = ("heldout", "test", "validation", "valid", "val", "eval", "dev")  # as peers call it
_ROWS = 16  # of a Parquet file at a time


@dataclass(frozen=True, slots=True)
class PeerFile:
    """One file, the name it has below its folder, and the split it is of: "" where none is said."""

    path: Path
    name: str
    split: str

    @property
    def schema(self) -> pa.Schema:
        """Names and types of its columns; raises StoreError for a file that is none or torn."""
        try:
            if self.path.suffix == ".parquet":
                return pq.read_schema(self.path)
            with pa.memory_map(str(self.path)) as source:
                return pa.ipc.open_stream(source).schema
        except (OSError, pa.ArrowInvalid) as error:
            raise self._torn(error) from error

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns, a few rows at a time; raises StoreError for a torn file."""
        try:
            if self.path.suffix == ".parquet":
                with pq.ParquetFile(self.path) as file:
                    yield from file.iter_batches(_ROWS, columns=list(columns))
                return
            with pa.memory_map(str(self.path)) as source:
                for batch in pa.ipc.open_stream(source):
                    yield batch.select(list(columns))
        except (OSError, pa.ArrowInvalid) as error:
            raise self._torn(error) from error

    def _torn(self, error: Exception) -> StoreError:
        return StoreError(f"cannot read {self.path}: {first_line(error)}; fetch or write it again")


def peer_files(folder: Path) -> list[PeerFile]:
    """Return the files of a folder in order; raises ConfigError where there are none.

    A folder below it, or the part of a file's name before its number, may say which split a file is
    of (``train-00000-of-00002.parquet``).
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give the one that the peer's files lie in")
    found = [
        PeerFile(path, path.relative_to(folder).as_posix(), _split(path.relative_to(folder)))
        for path in (*_saved(folder), *sorted(folder.rglob("*.parquet")))
    ]
    if not found:
        raise ConfigError(
            f"{folder} has no *.parquet file and nothing that datasets.save_to_disk wrote "
            f"(state.json): write the rows as one of them"
        )
    splits = {file.split for file in found}
    if "" in splits and len(splits) > 1:
        bare = next(file for file in found if not file.split)
        raise ConfigError(
            f"{folder}: {bare.name} says of no split that it is its own, other files do: lay it "
            f"in a folder train or heldout, or import one folder at a time"
        )
    return found


def _saved(folder: Path) -> Iterator[Path]:
    for state in sorted(folder.rglob("state.json")):
        try:
            files = [file["filename"] for file in json.loads(state.read_bytes())["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"cannot read {state}: {first_line(error)}; save the data set again"
            ) from error
        yield from (state.parent / name for name in files)


def _split(name: Path) -> str:
    for word in (*name.parts[:-1], name.name.partition("-")[0].partition(".")[0]):
        if word in HELDOUT:
            return "heldout"
        if word == "train":
            return "train"
    return ""


def require_columns(file: PeerFile, names: Sequence[str], peer: str) -> None:
    """Raise ConfigError for a column that is missing or holds no lists of numbers."""
    schema = file.schema
    for name in names:
        if name not in schema.names:
            raise ConfigError(
                f"{file.path} has no column {name}, expected {', '.join(names)} as {peer} has "
                f"them; there are: {', '.join(schema.names)}"
            )
        dtype, depth = schema.field(name).type, 0
        while _is_list(dtype):
            dtype, depth = dtype.value_type, depth + 1
        is_number = pa.types.is_integer(dtype) or pa.types.is_floating(dtype)
        if not is_number or depth not in (1, 2):
            raise ConfigError(
                f"{file.path}: column {name} is {schema.field(name).type}, expected lists of "
                f"numbers as {peer} has them"
            )


def _is_list(dtype: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(dtype) for is_kind in kinds)


def array_of(values: pa.Scalar, name: str, dtype: npt.DTypeLike) -> Array:
    """Return a row's list [N], or lists [N, M] of one length, as numbers of ``dtype``.

    Raises MalformedRecord for nulls and for lists of unequal lengths.
    """
    if not values.is_valid:
        raise MalformedRecord("null values", f"{name} is null")
    found = values.values
    shape: tuple[int, ...] = (len(found),)
    if _is_list(found.type):
        widths = set(found.value_lengths().to_pylist())
        if None in widths or found.null_count:
            raise MalformedRecord("null values", f"{name} holds null")
        if len(widths) > 1:
            raise MalformedRecord(
                "unequal k", f"{name} holds lists of {min(widths)} to {max(widths)} values"
            )
        shape = (len(found), widths.pop() if widths else 0)
        found = found.flatten()
    if found.null_count:
        raise MalformedRecord("null values", f"{name} holds null")
    return np.asarray(found.to_numpy(zero_copy_only=False)).astype(dtype).reshape(shape)
