"""Rows of token files -> rows of the table, one piece after another; nothing is shared.

Rejected and counted, as malformed: ``missing_ids`` (null), ``null_in_ids``, ``missing_mask``,
``null_in_mask``, ``mask_of_other_length``, ``mask_not_0_or_1``, ``missing_labels``,
``null_in_labels``, ``labels_of_other_length``, ``labels_contradict_ids`` and
``token_outside_vocabulary``; more of them than ``max_rejected_fraction`` of a shard's rows end the
step. Counted alone: ``too_few_tokens``, ``too_long``, ``nothing_scored``, ``duplicate_sequence``
(a row of the same shard), ``packing_remainder``.

Memory: a row at a time, and the keys of a shard's rows; files are mapped.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from schemas.errors import ConfigError, RejectLimitError
from schemas.sample_id import sample_id_of
from schemas.tables.conversations import Conversation
from schemas.tables.documents import Document
from stages.file_map import Piece, PieceWork
from stages.sources.reading.rejects import MalformedRecord, UnusableRecord
from stages.sources.reading.tokens import packing_end
from stages.sources.token_files.layout import HELDOUT, FileRange, opened, stamps_of
from stages.sources.token_files.stage import TokenFilesStage
from stages.sources.token_files.token_file import Array, Record
from stages.stage import Rejected, StageContext

Row = Document | Conversation
JOINED_ROWS = 64  # packed together: a copy a document would cost more than the rest
ALL_TRAIN = "f" * 24  # stands for a hash that nobody asks for


@contextmanager
def open_work(stage: TokenFilesStage, context: StageContext) -> Iterator[PieceWork]:
    """Yield the work; only ``pack`` asks for something of the tokenizer, what ends a text."""
    is_packed = stage.mode == "pack"
    eos_id = packing_end(Path(stage.tokenizer), length=stage.length) if is_packed else None
    yield partial(make_rows, stage, context.vocab_size, eos_id)


def make_rows(
    stage: TokenFilesStage, vocab_size: int, eos_id: int | None, piece: Piece
) -> Iterator[Row | Rejected]:
    """Yield the rows of one shard, in the order of the files, and what makes none.

    Bad rows are told of with the train shard that they are in. Raises RejectLimitError where too
    many are malformed, ConfigError for a file that has changed or contradicts itself.
    """
    maker = _Maker(stage, vocab_size, piece.split)
    usable = maker.usable(piece)
    made = maker.rows(usable) if eos_id is None else maker.packed(usable, eos_id)
    seen: set[str] = set()
    for row in made:
        if isinstance(row, Rejected):
            yield row
        elif row.sample_id in seen:
            yield Rejected(row.sample_id, "duplicate_sequence")
        else:
            seen.add(row.sample_id)
            yield row
    maker.require_within_limit()


@dataclass
class _Usable:
    """The ids of a row that reads well and is on this side, their hash, and what is scored."""

    ids_T: Array
    key: str
    scored_T: Array | None
    is_cut: bool


class _Maker:
    def __init__(self, stage: TokenFilesStage, vocab_size: int, split: str) -> None:
        self.stage, self.vocab_size, self.split = stage, vocab_size, split
        self.is_told = split != HELDOUT
        self.below = int(stage.heldout_fraction * 2**64)
        self.num_read = 0
        self.malformed: Counter[str] = Counter()
        self.first = ""

    def usable(self, piece: Piece) -> Iterator[_Usable | Rejected]:
        """Yield the rows of this side as they are in the files."""
        for part in piece.records:
            for number, record in enumerate(self._records(part), part.start):
                self.num_read += 1
                try:
                    found = self._judged(record)
                except UnusableRecord as error:
                    place = f"{part.path.name} row {number}"
                    if isinstance(error, MalformedRecord):
                        self.malformed[error.reason] += 1
                        self.first = self.first or f"{part.path} row {number}: {error}"
                    if self.is_told:
                        yield Rejected(place, error.reason)
                    continue
                if (int(found.key[:16], 16) < self.below) == (self.split == HELDOUT):
                    yield found

    def _records(self, part: FileRange) -> Iterator[Record]:
        source = self.stage.source
        if stamps_of(source, part.path) != part.stamps:
            raise ConfigError(
                f"{part.path} has changed since this run was planned: run again to plan anew"
            )
        return opened(source, part.path, self.vocab_size).read(part.start, part.stop)

    def _judged(self, record: Record) -> _Usable:
        """Return what is usable of a row; raises UnusableRecord."""
        ids_T, scored_T, stage = record.ids_T, record.scored_T, self.stage
        if record.problem:
            raise MalformedRecord(record.problem, record.problem.replace("_", " "))
        fewest = 1 if stage.mode == "pack" else 2
        if len(ids_T) < fewest:
            raise UnusableRecord("too_few_tokens", f"{len(ids_T)} tokens, at least {fewest}")
        low = 0 if ids_T.dtype.kind == "u" else int(ids_T.min())
        high = int(ids_T.max())
        if low < 0 or high >= self.vocab_size:
            found = low if low < 0 else high
            raise MalformedRecord(
                "token_outside_vocabulary", f"token {found}, the model has {self.vocab_size}"
            )
        ids_T = ids_T.astype(np.uint32, copy=False)
        is_cut = stage.mode != "pack" and len(ids_T) > stage.length
        if is_cut and stage.mode == "as_given":
            raise UnusableRecord("too_long", f"{len(ids_T)} tokens, at most {stage.length}")
        if scored_T is not None and scored_T.dtype != np.bool_:
            if ((scored_T != 0) & (scored_T != 1)).any():
                raise MalformedRecord("mask_not_0_or_1", "mask holds other numbers than 0 and 1")
            scored_T = scored_T != 0
        if is_cut:
            ids_T = ids_T[: stage.length]
            scored_T = None if scored_T is None else scored_T[: stage.length]
        if scored_T is not None and not scored_T[1:].any():
            raise UnusableRecord("nothing_scored", "no token after the first is scored")
        needs_no_key = stage.mode == "pack" and self.below == 0
        return _Usable(ids_T, ALL_TRAIN if needs_no_key else sample_id_of(ids_T), scored_T, is_cut)

    def rows(self, usable: Iterator[_Usable | Rejected]) -> Iterator[Row | Rejected]:
        """Yield a row for each."""
        for found in usable:
            if isinstance(found, Rejected):
                yield found
            elif found.scored_T is None:
                yield Document(sample_id=found.key, split=self.split, input_ids_T=found.ids_T)
            else:
                row = Conversation(
                    sample_id="",
                    split=self.split,
                    source_id="",
                    input_ids_T=found.ids_T,
                    scored_S2=_spans(found.scored_T),
                    is_cut=found.is_cut,
                )
                yield replace(row, sample_id=row.hashed_id)

    def packed(self, usable: Iterator[_Usable | Rejected], eos_id: int) -> Iterator[Row | Rejected]:
        """Yield rows of exactly ``length`` tokens, and what is left over at the end."""
        length, eos_1 = self.stage.length, np.array([eos_id], np.uint32)
        waiting: list[Array] = []
        num_waiting = 0
        for found in usable:
            if isinstance(found, Rejected):
                yield found
                continue
            end = eos_1[: int(found.ids_T[-1] != eos_id)]
            waiting += [found.ids_T, end]
            num_waiting += len(found.ids_T) + len(end)
            if num_waiting >= JOINED_ROWS * length:
                stream_N = np.concatenate(waiting)
                used = len(stream_N) - len(stream_N) % length
                yield from self._documents(stream_N[:used].reshape(-1, length))
                waiting, num_waiting = [stream_N[used:]], len(stream_N) - used
        stream_N = np.concatenate([eos_1[:0], *waiting])
        used = len(stream_N) - len(stream_N) % length
        yield from self._documents(stream_N[:used].reshape(-1, length))
        if used < len(stream_N):
            yield Rejected(f"the last {len(stream_N) - used} tokens", "packing_remainder")

    def _documents(self, ids_RT: Array) -> Iterator[Document]:
        hashed_RT = ids_RT.astype("<i8")  # as they are hashed: widened at once, not row by row
        for ids_T, hashed_T in zip(ids_RT, hashed_RT, strict=True):
            yield Document(sample_id=sample_id_of(hashed_T), split=self.split, input_ids_T=ids_T)

    def require_within_limit(self) -> None:
        """Raise RejectLimitError where too many rows of the piece are malformed."""
        count, limit = self.malformed.total(), self.stage.max_rejected_fraction
        if count > limit * self.num_read:
            reason, most = self.malformed.most_common(1)[0]
            raise RejectLimitError(
                f"{count:,} of {self.num_read:,} rows are malformed, more than "
                f"max_rejected_fraction {limit}: {most:,} x '{reason}', first {self.first}; "
                f"repair them, or raise max_rejected_fraction"
            )


def _spans(scored_T: Array) -> Array:
    """Return starts and ends of the runs of scored tokens [S, 2]; the first has no context."""
    marks_T = np.zeros(len(scored_T) + 1, np.int8)
    marks_T[1:-1] = scored_T[1:]
    return np.flatnonzero(np.diff(marks_T)).reshape(-1, 2).astype(np.int32) + 1
