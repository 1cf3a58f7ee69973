"""The work of ``aligned_spans``: ids to bytes, bytes to other ids, sums of log-probs over spans.

Sums are of the table's rounded log-probs, in float64: of float16 a term is off by up to 2^-11 of
itself, of ``threshold`` encodings by 2^-8.

Dimensions: P = scored positions of the teacher, S = spans.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.open_table import OpenTable, known_table, open_table
from schemas.storage.files import Folder
from schemas.storage.manifest import read_manifest
from schemas.storage.records import ShardRecord
from schemas.storage.shards import read_verified, split_of
from schemas.table import Table
from schemas.tables.aligned_spans import ALIGNED_ENTRIES, AlignedEntries, AlignedSpans
from stages.models.checkpoints.token_bytes import ByteTokenizer, UnknownBytes
from stages.signals.aligned_spans.alignment import Alignment, align
from stages.signals.aligned_spans.entries import first_tokens, kept_of, with_entries
from stages.signals.aligned_spans.stage import AlignedSpansStage
from stages.stage import Rejected, StageContext, Work

Array = npt.NDArray[Any]
_READ = ("sample_id", "first_target", "next_token_logprobs_P")


@contextmanager
def open_work(stage: AlignedSpansStage, context: StageContext) -> Iterator[Work]:
    """Open both tokenizers and the documents; the work aligns the rows of one shard."""
    teacher = ByteTokenizer(context.models[stage.teacher].path)
    student = ByteTokenizer(Path(stage.tokenizer))
    documents = _Documents(open_table(context.other_folders[0], split=None, verify=False))
    assert context.input_folder is not None, "a table is read"
    signals = known_table(read_manifest(context.input_folder), context.input_folder)

    names = list(signals.columns) if stage.entries else list(_READ)
    first_V = first_tokens(teacher, student) if stage.entries else None

    def work(shard: pa.Table) -> Iterable[AlignedSpans | Rejected]:
        split = split_of(shard)
        for batch in shard.to_batches():
            columns = [signals.column_values(batch, name) for name in names]
            for values in zip(*columns, strict=True):
                signal = dict(zip(names, values, strict=True))
                sample_id = signal["sample_id"]
                ids_T = documents.ids_of(sample_id)
                if ids_T is None:
                    yield Rejected(sample_id, "the documents have no such row")
                    continue
                try:
                    found = align(ids_T, teacher, student)
                    row = _row(found, signal, split, student.max_length)
                except UnknownBytes as error:
                    yield Rejected(sample_id, str(error))
                    continue
                if first_V is not None:
                    places_S = _first_positions(row, found, signal["first_target"])
                    row = with_entries(row, kept_of(signal), places_S, first_V)
                yield replace(row, sample_id=row.hashed_id)

    yield work


def _row(found: Alignment, signal: Mapping[str, Any], split: str, max_length: int) -> AlignedSpans:
    """Return a row without its key; raises UnknownBytes with the reason where there is none.

    A span counts where the teacher has a log-prob of each of its tokens, and the student one token
    at least before it.
    """
    logprobs_P = signal["next_token_logprobs_P"]
    if np.isnan(logprobs_P).any():
        raise UnknownBytes("the log-probs of its tokens are not known")
    if len(found.input_ids_U) > max_length:
        raise UnknownBytes(f"more tokens than the tokenizer's maximum of {max_length}")
    place_S2 = found.teacher_S2 - signal["first_target"]
    counts_S = (place_S2[:, 0] >= 0) & (place_S2[:, 1] <= len(logprobs_P))
    counts_S &= found.student_S2[:, 0] >= 1
    if not counts_S.any():
        raise UnknownBytes("no span that both tokenizers agree on")
    before = np.concatenate([[0.0], np.cumsum(logprobs_P, dtype=np.float64)])
    sums_S = before[place_S2[counts_S, 1]] - before[place_S2[counts_S, 0]]
    return AlignedSpans(
        sample_id="",
        split=split,
        source_id=signal["sample_id"],
        input_ids_T=found.input_ids_U,
        scored_S2=found.student_S2[counts_S],
        span_logprobs_S=np.minimum(sums_S, 0.0).astype(np.float32),
        span_bytes_S=found.bytes_S[counts_S],
        num_bytes=found.num_bytes,
    )


def _first_positions(row: AlignedSpans, found: Alignment, first_target: int) -> Array:
    """Return the teacher's position [S] where each span of the row begins.

    -1 where a space that a tokenizer puts before a text, or the like, is predicted there.
    """
    at_S = np.searchsorted(found.student_S2[:, 0], row.scored_S2[:, 0])
    places_S = found.teacher_S2[at_S, 0] - first_target
    return np.where(found.whole_S[at_S], places_S, -1)


class _Documents:
    """The token ids of a table of documents, by key."""

    def __init__(self, table: OpenTable) -> None:
        """Read the keys; rows are read as they are asked for."""
        self._table = table
        keys = table.sample_ids()
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def ids_of(self, sample_id: str) -> Array | None:
        """Return the ids of a row, None where there is none."""
        key = sample_id.encode()
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return None
        ids_T: Array = self._table.row(int(self._order[at]))["input_ids_T"]
        return ids_T


def measures(table: Table[Any], folder: Folder, shards: Sequence[ShardRecord]) -> dict[str, float]:
    """Return sums over a finished table, read once, and means."""
    total = dict.fromkeys(("bytes", "bytes_in_spans", "spans", "tokens_in_spans"), 0)
    mass = 0.0
    for shard in shards:
        for batch in read_verified(folder / shard.file, shard.sha256).to_batches():
            for row in table.rows(batch):
                total["bytes"] += row.num_bytes
                total["bytes_in_spans"] += int(row.span_bytes_S.sum(dtype=np.int64))
                total["spans"] += len(row.scored_S2)
                total["tokens_in_spans"] += row.num_positions
                if isinstance(row, AlignedEntries):
                    mass += float(np.exp(row.entry_logprobs_E.astype(np.float64)).sum())
    spans = max(1, total["spans"])
    return {
        **{name: float(value) for name, value in total.items()},
        **({"mass_of_entries": mass / spans} if table is ALIGNED_ENTRIES else {}),
        "share_of_bytes": total["bytes_in_spans"] / max(1, total["bytes"]),
        "bytes_a_span": total["bytes_in_spans"] / spans,
        "tokens_a_span": total["tokens_in_spans"] / spans,
    }
