"""Phase 2 of ingest: documents by content key -> rows of token ids, spooled by ``sample_id``.

A document is held out when the lower half of its content key, read as a fraction of 2^64, lies
below ``heldout_fraction``: the same document always falls on the same side, whatever else is in
the input, and its duplicates with it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from schemas.sample_id import sample_id_of
from schemas.tables.documents import SPLITS
from stages.sources.documents.packing import pack, truncate
from stages.sources.documents.sequences import SCHEMA
from stages.sources.documents.spool import KEY, Spool, key_columns
from stages.sources.documents.stage import IngestStage
from stages.sources.documents.tally import Tally
from stages.sources.reading.control_tokens import REJECTED, ControlTokenRule
from stages.sources.reading.rejects import LISTED
from stages.sources.reading.tokens import IdArray, TextTokenizer
from stages.stage import OnProgress

_ENCODE_CHARS = 1 << 20  # tokenised at a time: an encoding takes some 100 bytes a token
TRAIN, HELDOUT = SPLITS


def spool_sequences(
    documents: Spool,
    sequences: Spool,
    stage: IngestStage,
    *,
    tokenizer: TextTokenizer,
    tally: Tally,
    on_progress: OnProgress,
) -> Tally:
    """Cut all ranges of ``documents`` into rows, from where the newest segment left off.

    A segment of ``sequences`` holds the rows of as many consecutive ranges of ``documents`` as
    make it have as many segments as ranges.
    """
    cutter = _Cutter(stage, tokenizer, tally, sequences.state)
    step = documents.ranges // sequences.ranges
    for index in range(sequences.num_segments, sequences.ranges):
        rows = cutter.cut(documents.read_ranges(index * step, (index + 1) * step))
        if index + 1 == sequences.ranges:
            cutter.drop_remainders()
        sequences.write_segment(rows, cutter.state())
        made, done = cutter.tally.rows_made, f"{index + 1} of {sequences.ranges}"
        on_progress(f"{made:,} rows made, {done} ranges of documents tokenised")
    return cutter.tally


class _Cutter:
    """Turns ranges of documents into rows, in order; its state is what it carries between them."""

    def __init__(
        self,
        stage: IngestStage,
        tokenizer: TextTokenizer,
        tally: Tally,
        state: dict[str, Any] | None,
    ) -> None:
        self.stage = stage
        self.tokenizer = tokenizer
        self.tally = Tally.from_json(state["tally"]) if state else tally
        self.rule = ControlTokenRule(tokenizer, stage.control_tokens)
        self.prefix_ids = tokenizer.first_ids(stage.bos)
        carry = state["carry"] if state else {split: [] for split in SPLITS}
        self.carry = {split: np.array(carry[split], np.uint32) for split in SPLITS}

    def state(self) -> dict[str, Any]:
        carry = {split: self.carry[split].tolist() for split in SPLITS}
        return {"tally": self.tally.as_json(), "carry": carry}

    def cut(self, documents: pl.DataFrame) -> pl.DataFrame:
        rows: dict[str, list[IdArray]] = {split: [] for split in SPLITS}
        if documents.height:
            for split, texts in self._batches(documents):
                rows[split] += self._rows_of(texts, split)
        self.tally.rows_made += sum(len(rows[split]) for split in SPLITS)
        return _frame(rows)

    def drop_remainders(self) -> None:
        self.tally.reject("packing_remainder", sum(len(ids_T) > 0 for ids_T in self.carry.values()))
        self.carry = {split: np.zeros(0, np.uint32) for split in SPLITS}

    def _batches(self, documents: pl.DataFrame) -> Iterator[tuple[str, list[str]]]:
        """Yield the distinct texts of a range in the order of their keys, some at a time."""
        distinct = documents.unique(subset=KEY, keep="first", maintain_order=True).sort(KEY)
        self._reject_duplicates(documents)
        below = pl.lit(int(self.stage.heldout_fraction * 2**64), dtype=pl.UInt64)
        batch_of = pl.col("text").str.len_chars().cum_sum() // _ENCODE_CHARS
        marked = distinct.select("text", heldout=pl.col(KEY[1]) < below, batch=batch_of)
        for batch in marked.partition_by("batch", maintain_order=True):
            for split, heldout in ((TRAIN, False), (HELDOUT, True)):
                yield split, batch.filter(pl.col("heldout") == heldout)["text"].to_list()

    def _reject_duplicates(self, documents: pl.DataFrame) -> None:
        again = documents.filter(~pl.struct(KEY).is_first_distinct())
        for text in again["text"].head(LISTED):
            self.tally.reject_text("duplicate", text, "read before, far from here")
        self.tally.reject("duplicate", max(0, again.height - LISTED))

    def _rows_of(self, texts: list[str], split: str) -> list[IdArray]:
        usable = [text for text in texts if self._may_be_used(text)]
        encoded = zip(usable, self.tokenizer.encode(usable), strict=True)
        documents = [ids_T for text, ids_T in encoded if self._is_usable(text, ids_T)]
        room = self.stage.length - len(self.prefix_ids)
        if self.stage.mode == "truncate":
            pieces, num_cut = truncate(documents, length=room)
            self.tally.truncated += num_cut
        else:
            assert self.tokenizer.eos_id is not None
            pieces_BL, self.carry[split] = pack(
                documents, self.carry[split], length=room, eos_id=self.tokenizer.eos_id
            )
            pieces = list(pieces_BL)
        return [np.concatenate([self.prefix_ids, piece_T]) for piece_T in pieces]

    def _may_be_used(self, text: str) -> bool:
        outcome = self.rule.outcome([text])
        if outcome == REJECTED:
            self.tally.reject_text(outcome, text, "it spells a control token")
        elif outcome is not None:
            self.tally.reject(outcome)
        return outcome != REJECTED

    def _is_usable(self, text: str, ids_T: IdArray) -> bool:
        fewest = 1 if self.stage.mode == "pack" or len(self.prefix_ids) else 2
        largest, size = int(ids_T.max(initial=0)), self.tokenizer.vocab_size
        if len(ids_T) < fewest:
            said = f"{len(ids_T)} tokens, a row has {fewest} at least"
            self.tally.reject_text("too_few_tokens", text, said)
        elif largest >= size:
            said = f"token {largest}, the model has {size}"
            self.tally.reject_text("token_outside_vocabulary", text, said)
        else:
            return True
        return False


def _frame(rows: dict[str, list[IdArray]]) -> pl.DataFrame:
    """Return rows with their sample_id and its key (96 bits, padded to 128)."""
    all_rows = [*rows[TRAIN], *rows[HELDOUT]]
    sample_ids = [sample_id_of(ids_T) for ids_T in all_rows]
    offsets = np.cumsum([0, *(len(ids_T) for ids_T in all_rows)])
    flat_N = np.concatenate(all_rows) if all_rows else np.zeros(0, np.uint32)
    columns = [
        pa.array(sample_ids, SCHEMA.field("sample_id").type),
        pa.array([False] * len(rows[TRAIN]) + [True] * len(rows[HELDOUT]), pa.bool_()),
        pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat_N, pa.uint32())),
    ]
    frame = pl.from_arrow(pa.table(columns, names=SCHEMA.names))
    assert isinstance(frame, pl.DataFrame)
    keys = key_columns([bytes.fromhex(sample_id).ljust(16, b"\0") for sample_id in sample_ids])
    return frame.with_columns(**{name: pl.Series(keys[name]) for name in KEY})
