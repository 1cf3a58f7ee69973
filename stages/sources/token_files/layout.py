"""Which rows of which files each shard is made of: known from headers, whatever makes the shard.

The rows of all files, in order, are cut into train shards of ``rows_per_shard``. What is held out
of several neighbouring ones, as many as make about one shard, is a shard of its own, which reads
the same rows again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from schemas.errors import ConfigError
from schemas.storage.checksums import remembered_sha256_of_all
from schemas.tables.documents import SPLITS
from stages.file_map import Piece
from stages.sources.reading.source import InputIdentity, find_files
from stages.sources.reading.tokens import model_limits
from stages.sources.token_files.columnar import ColumnFile
from stages.sources.token_files.datatrove import DatatroveFile, parts_of
from stages.sources.token_files.megatron import MegatronFile, pair_of
from stages.sources.token_files.stage import (
    ColumnFiles,
    DatatroveFiles,
    MegatronFiles,
    TokenFilesStage,
    TokenSource,
)
from stages.sources.token_files.token_file import TokenFile

TRAIN, HELDOUT = SPLITS
MOST_TOGETHER = 16  # train shards whose held-out rows make one shard
Stamps = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class FileRange:
    """Rows ``start`` to ``stop`` of a file that had these sizes and times when shards were cut."""

    path: Path
    stamps: Stamps
    start: int
    stop: int


def identities(source: TokenSource) -> list[InputIdentity]:
    """Return name, size and sha256 of each file that is read, in order; hashed once."""
    parts = [part for path in main_files(source) for part in _parts(source, path)]
    hashes = remembered_sha256_of_all(parts)
    return [
        {"name": part.name, "size": part.stat().st_size, "sha256": sha256}
        for part, sha256 in zip(parts, hashes, strict=True)
    ]


def main_files(source: TokenSource) -> list[Path]:
    """Return the files, one of each pair or group; raises ConfigError for patterns without any."""
    paths = find_files(source.paths)
    if isinstance(source, MegatronFiles):
        return list(dict.fromkeys(pair_of(path)[0] for path in paths))
    if isinstance(source, DatatroveFiles):
        ends = (".ds.index", ".ds.loss", ".ds.metadata")
        return [path for path in paths if not path.name.endswith(ends)] or list(paths)
    return list(paths)


def cut_pieces(stage: TokenFilesStage) -> tuple[Piece, ...]:
    """Return what each shard is made of; raises ConfigError where there is no row."""
    train = []
    for ranges in _ranges(stage):
        num_rows = sum(part.stop - part.start for part in ranges)
        train.append(Piece(TRAIN, num_rows, ranges))
    if not train:
        raise ConfigError(
            f"source.paths: {', '.join(stage.source.paths)} hold no row: nothing can be made"
        )
    if stage.heldout_fraction == 0:
        return tuple(train)
    together = min(MOST_TOGETHER, math.ceil(1 / stage.heldout_fraction))
    heldout = [
        Piece(
            HELDOUT,
            sum(piece.num_rows for piece in train[first : first + together]),
            tuple(part for piece in train[first : first + together] for part in piece.records),
        )
        for first in range(0, len(train), together)
    ]
    return (*train, *heldout)


def count_tokens(stage: TokenFilesStage) -> int:
    """Return about how many ids the files hold."""
    vocab_size = model_limits(Path(stage.tokenizer), 0)[0]
    source = stage.source
    return sum(opened(source, path, vocab_size).num_tokens for path in main_files(source))


def opened(source: TokenSource, path: Path, vocab_size: int) -> TokenFile:
    """Return a file, known by its header; read anew when it is another one."""
    return _opened(source, path, vocab_size, stamps_of(source, path))


@lru_cache(maxsize=64)
def _opened(source: TokenSource, path: Path, vocab_size: int, stamps: Stamps) -> TokenFile:
    if isinstance(source, ColumnFiles):
        return ColumnFile(source, path)
    if isinstance(source, MegatronFiles):
        return MegatronFile(path)
    return DatatroveFile(path, vocab_size=vocab_size, mask=source.mask)


def stamps_of(source: TokenSource, path: Path) -> Stamps:
    """Return size and time of each file that belongs to one."""
    stats = [part.stat() for part in _parts(source, path)]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def _parts(source: TokenSource, path: Path) -> Sequence[Path]:
    if isinstance(source, MegatronFiles):
        return pair_of(path)
    if isinstance(source, DatatroveFiles):
        return parts_of(path, mask=source.mask)
    return [path]


def _ranges(stage: TokenFilesStage) -> list[tuple[FileRange, ...]]:
    """Return the ranges of each train shard."""
    source, size = stage.source, stage.rows_per_shard
    vocab_size = model_limits(Path(stage.tokenizer), 0)[0]
    shards: list[tuple[FileRange, ...]] = []
    parts: list[FileRange] = []
    room = size
    for path in main_files(source):
        num_rows, stamps = opened(source, path, vocab_size).num_rows, stamps_of(source, path)
        start = 0
        while start < num_rows:
            stop = min(start + room, num_rows)
            parts.append(FileRange(path, stamps, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                shards.append(tuple(parts))
                parts, room = [], size
    return [*shards, tuple(parts)] if parts else shards
