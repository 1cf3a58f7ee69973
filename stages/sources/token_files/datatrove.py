"""Files ``NAME.ds`` of datatrove: raw token ids, documents end to end, little-endian.

Beside it lie ``NAME.ds.index``, where each document ends, in tokens (uint64 [documents]);
``NAME.ds.loss``, a byte a token, 1 where it is trained on; ``NAME.ds.metadata``, whose first line
is ``tokenizer|bytes of an id``. Without that line an id has 2 bytes where they hold the vocabulary.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from schemas.errors import ConfigError
from schemas.table import token_id_type
from stages.sources.token_files.token_file import Record, mapped


class DatatroveFile:
    """One ``.ds`` and what lies beside it, held to it by size; raises ConfigError as below."""

    def __init__(self, path: Path, *, vocab_size: int, mask: bool | None) -> None:
        """Read the metadata and the end of the index; raises ConfigError where sizes differ."""
        self.path, self.mask = path, mask
        index, loss = _beside(path, ".index"), _beside(path, ".loss")
        self.dtype = np.dtype(f"<u{_id_bytes(path, vocab_size)}")
        if not index.is_file():
            raise ConfigError(
                f"{path}: {index.name} is not beside it, which says where documents end: write "
                f"it again with save_index"
            )
        size, index_size = path.stat().st_size, index.stat().st_size
        if size % self.dtype.itemsize:
            raise ConfigError(
                f"{path}: it has {size:,} bytes, no multiple of the {self.dtype.itemsize} of an id"
            )
        if index_size % 8:
            raise ConfigError(f"{index}: it has {index_size:,} bytes, no multiple of 8: it is cut")
        self._num_tokens = size // self.dtype.itemsize
        self.ends_D = mapped(index, "<u8")
        end = int(self.ends_D[-1]) if len(self.ends_D) else 0
        if end != self._num_tokens:
            raise ConfigError(
                f"{index}: its last document ends at token {end:,}, and {path.name} has "
                f"{self._num_tokens:,} of {self.dtype.itemsize} bytes: one of them is cut, or is "
                f"of another file"
            )
        self._require_loss(loss)

    @property
    def num_rows(self) -> int:
        """Documents."""
        return len(self.ends_D)

    @property
    def num_tokens(self) -> int:
        """All ids."""
        return self._num_tokens

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """Yield documents ``start`` to ``stop``."""
        ids_N = mapped(self.path, self.dtype)
        loss_N = mapped(_beside(self.path, ".loss"), np.uint8) if self.mask else None
        first = int(self.ends_D[start - 1]) if start else 0
        ends = [first, *self.ends_D[start:stop].tolist()]
        for begin, end in pairwise(ends):
            if not begin <= end <= len(ids_N):
                raise ConfigError(
                    f"{_beside(self.path, '.index')}: a document among {start} to {stop} goes from "
                    f"token {begin:,} to {end:,}, of {len(ids_N):,}: write the files again"
                )
            scored_T = None if loss_N is None else loss_N[begin:end]
            yield Record(ids_N[begin:end], scored_T)

    def _require_loss(self, loss: Path) -> None:
        if self.mask is None and loss.is_file():
            raise ConfigError(
                f"{loss} lies beside {self.path.name}: say `mask: true` in the source to score "
                f"those tokens alone, or `mask: false` to score all"
            )
        if not self.mask:
            return
        found = loss.stat().st_size if loss.is_file() else None
        if found != self._num_tokens:
            there = "is not there" if found is None else f"has {found:,} bytes"
            raise ConfigError(
                f"{loss} {there}, expected one byte for each of {self._num_tokens:,} tokens"
            )


def parts_of(path: Path, *, mask: bool | None) -> list[Path]:
    """Return the files that decide what is read; raises ConfigError for another name."""
    if path.suffix != ".ds":
        raise ConfigError(f"{path}: expected the name of a .ds file")
    beside = [_beside(path, end) for end in (".index", ".metadata", *((".loss",) if mask else ()))]
    return [path, *(part for part in beside if part.is_file())]


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def _id_bytes(path: Path, vocab_size: int) -> int:
    """Return how many bytes an id takes."""
    narrowest = token_id_type(vocab_size).bit_width // 8
    metadata = _beside(path, ".metadata")
    if not metadata.is_file():
        return int(narrowest)
    first, *_ = metadata.read_text(encoding="utf-8").splitlines() or [""]
    said = first.rpartition("|")[2] if "|" in first else str(narrowest)
    if said not in ("2", "4"):
        raise ConfigError(f"{metadata}: an id has '{said}' bytes, expected 2 or 4")
    return int(said)
