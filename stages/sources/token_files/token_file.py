"""What every format of token files gives: how many rows there are, and the rows of a range.

Dimensions: T = tokens of a row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import ConfigError, first_line

Array = npt.NDArray[Any]


class Record(NamedTuple):
    """One row as a file holds it: ids of any integer type, and which of them are scored, if told.

    ``problem`` is the reason for which it makes no row, "" where it reads well.
    """

    ids_T: Array
    scored_T: Array | None = None
    problem: str = ""


NOTHING = np.zeros(0, np.int64)


def unreadable(problem: str) -> Record:
    """Return a row that is there and does not read."""
    return Record(NOTHING, None, problem)


class TokenFile(Protocol):
    """One file, or the files that belong together, known by their headers until rows are read."""

    @property
    def num_rows(self) -> int:
        """Rows of the file: documents, or lists of a column."""

    @property
    def num_tokens(self) -> int:
        """About how many ids there are."""

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """Yield some rows, in order; arrays may be views of a mapped file.

        Raises ConfigError for a file that contradicts itself.
        """


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn a library's failure to read into one line."""
    try:
        yield
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as {what}: {first_line(error)}") from error


def mapped(path: Path, dtype: npt.DTypeLike, offset: int = 0, count: int | None = None) -> Array:
    """Return numbers of a file as they lie there; only what is looked at is read."""
    size = np.dtype(dtype).itemsize
    if count is None:
        count = (path.stat().st_size - offset) // size
    if count == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)
