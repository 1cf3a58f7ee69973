"""Pairs ``NAME.bin`` and ``NAME.idx`` of Megatron-LM's IndexedDataset, version 1.

``.bin`` holds the ids of all sequences end to end. ``.idx`` holds, in little-endian order: 9 bytes
of magic, the version (uint64), the code of the ids' type (uint8), the numbers S of sequences and D
of document marks (uint64 each), the length of each sequence (int32 [S]), the byte in ``.bin`` that
it begins at (int64 [S]) and the sequence that each document begins with, and S at the end
(int64 [D]). A row is a document: all its sequences; without marks, a sequence.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from schemas.errors import ConfigError
from stages.sources.token_files.token_file import Record, mapped

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
FLOATS = {6: "float64", 7: "float32"}


class MegatronFile:
    """One pair, held to each other by header and sizes; raises ConfigError where they differ."""

    def __init__(self, path: Path) -> None:
        """Read the header; ``path`` is that of either file."""
        self.ids_path, self.index_path = pair_of(path)
        with self.index_path.open("rb") as stream:
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise self._wrong(f"it begins with {header[:9]!r}, expected {MAGIC!r}")
        _, version, code, self.num_sequences, self.num_marks = HEADER.unpack(header)
        if version != 1:
            raise self._wrong(f"its version is {version}, expected 1")
        if code not in TYPES:
            found = FLOATS.get(code, f"code {code}")
            raise self._wrong(f"its ids are {found}, expected one of {', '.join(TYPES.values())}")
        self.dtype = np.dtype(TYPES[code]).newbyteorder("<")
        expected = HEADER.size + 12 * self.num_sequences + 8 * self.num_marks
        if (found_size := self.index_path.stat().st_size) != expected:
            raise self._wrong(
                f"it has {found_size:,} bytes, expected {expected:,} for {self.num_sequences:,} "
                f"sequences and {self.num_marks:,} document marks: it is cut, or holds a mode a "
                f"sequence (multimodal), which is not read"
            )
        offset = HEADER.size
        self.lengths_S = mapped(self.index_path, "<i4", offset, self.num_sequences)
        offset += 4 * self.num_sequences
        self.starts_S = mapped(self.index_path, "<i8", offset, self.num_sequences)
        offset += 8 * self.num_sequences
        self.marks_D = mapped(self.index_path, "<i8", offset, self.num_marks)
        self._require_sizes()

    @property
    def num_rows(self) -> int:
        """Documents, or sequences where documents are not marked."""
        return int(self.num_marks - 1 if self.num_marks > 1 else self.num_sequences)

    @property
    def num_tokens(self) -> int:
        """All ids."""
        return self.ids_path.stat().st_size // self.dtype.itemsize

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """Yield documents ``start`` to ``stop``."""
        ids_N = mapped(self.ids_path, self.dtype)
        marks = np.arange(start, stop + 1)
        if self.num_marks > 1:
            marks = np.asarray(self.marks_D[start : stop + 1])
        in_order = (marks[1:] >= marks[:-1]).all() and marks[0] >= 0
        if not in_order or marks[-1] > self.num_sequences:
            raise self._wrong(f"documents {start} to {stop} are not marked in order")
        first, last = int(marks[0]), int(marks[-1])
        lengths_S = np.asarray(self.lengths_S[first:last], np.int64)
        begins_S, left_over = np.divmod(self.starts_S[first:last], self.dtype.itemsize)
        ends_S = begins_S + lengths_S
        if (lengths_S < 0).any() or (begins_S < 0).any() or (ends_S > len(ids_N)).any():
            raise self._wrong(f"a sequence among {first} to {last} lies outside {self.ids_path}")
        if (begins_S[1:] < ends_S[:-1]).any():
            raise self._wrong(f"sequences among {first} to {last} overlap")
        if left_over.any():
            raise self._wrong(f"a sequence among {first} to {last} begins inside an id")
        for begin, end in zip(marks[:-1] - first, marks[1:] - first, strict=True):
            parts = [ids_N[begins_S[at] : ends_S[at]] for at in range(begin, end)]
            yield Record(parts[0] if len(parts) == 1 else np.concatenate([ids_N[:0], *parts]))

    def _require_sizes(self) -> None:
        size = self.ids_path.stat().st_size
        if size % self.dtype.itemsize:
            raise self._wrong(
                f"its ids are {self.dtype.name}, and {self.ids_path} has {size:,} bytes, no "
                f"multiple of {self.dtype.itemsize}"
            )
        expected = 0
        if self.num_sequences:
            expected = int(self.starts_S[-1]) + int(self.lengths_S[-1]) * self.dtype.itemsize
        if size != expected:
            raise self._wrong(
                f"its sequences end at byte {expected:,}, and {self.ids_path} has {size:,} bytes: "
                f"one of them is cut, or they are not of one data set"
            )
        if self.num_marks > 1 and self.marks_D[0]:
            raise self._wrong(
                f"its first document begins with sequence {self.marks_D[0]:,}, expected 0"
            )
        if self.num_marks > 1 and self.marks_D[-1] != self.num_sequences:
            raise self._wrong(
                f"its last document ends with sequence {self.marks_D[-1]:,}, there are "
                f"{self.num_sequences:,}"
            )

    def _wrong(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.index_path}: {problem}; write the pair again")


def pair_of(path: Path) -> tuple[Path, Path]:
    """Return ``.bin`` and ``.idx`` of one data set; raises ConfigError where one is missing."""
    if path.suffix not in (".bin", ".idx"):
        raise ConfigError(f"{path}: expected the name of a .bin or .idx file")
    pair = path.with_suffix(".bin"), path.with_suffix(".idx")
    for part in pair:
        if not part.is_file():
            raise ConfigError(f"{path}: {part.name} is not beside it, and both are needed")
    return pair
