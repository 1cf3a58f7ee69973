"""Phase 1 of ingest: stream the source once, reject what is unusable, spool the rest by content.

A duplicate of a document in the segment at hand is dropped on the spot, so a text that stands a
million times in the input takes memory and disk once a segment; later ones fall in phase 2.

Cost: 20 MB of jsonl a CPU second (2026-11), most of it decoding and normalising; one core.
"""

import sys
from typing import Any

import polars as pl

from stages.sources.documents.spool import KEY, Spool, key_columns
from stages.sources.documents.stage import IngestStage
from stages.sources.documents.tally import Tally
from stages.sources.reading.cleaning import CleanText, clean
from stages.sources.reading.rejects import MalformedRecord, UnusableRecord, beginning
from stages.sources.reading.values import read_rows
from stages.stage import OnProgress

_READ_LIMIT = 1_000_000  # documents a segment, however few are kept: bounds what a crash repeats


def spool_documents(
    spool: Spool, stage: IngestStage, segment_bytes: int, on_progress: OnProgress
) -> Tally:
    """Spool all documents of the source, from where the newest segment left off."""
    state = spool.state or _state(Tally(), 0, 0, finished=False)
    tally = Tally.from_json(state["tally"])
    if state["finished"]:
        return tally
    segment = _Segment(segment_bytes)
    file, row = state["file"], state["row"]
    for rows in read_rows(stage.source, file=file, row=row):
        file, row = rows.file, rows.next_row
        for number, value in zip(rows.numbers, rows.values, strict=True):
            tally.rejects.num_read += 1
            segment.num_read += 1
            with tally.rejects.passing(f"{rows.where}:{number}"):
                _sort_out(value, stage, segment)
        if segment.is_full:
            spool.write_segment(segment.frame(), _state(tally, file, row, finished=False))
            segment = _Segment(segment_bytes)
            on_progress(f"{tally.documents_read:,} documents read")
    spool.write_segment(segment.frame(), _state(tally, file, row, finished=True))
    return tally


def _sort_out(value: object, stage: IngestStage, segment: "_Segment") -> None:
    if isinstance(value, MalformedRecord):
        raise value
    cleaned = clean(value, min_chars=stage.min_chars, max_chars=stage.max_chars)
    if not segment.add(cleaned):
        raise UnusableRecord("duplicate", f"read before: {beginning(cleaned.text)}")


def _state(tally: Tally, file: int, row: int, *, finished: bool) -> dict[str, Any]:
    return {"tally": tally.as_json(), "file": file, "row": row, "finished": finished}


class _Segment:
    """The documents since the last segment, each content once, the first spelling kept."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.texts: dict[bytes, str] = {}
        self.num_bytes = 0
        self.num_read = 0

    @property
    def is_full(self) -> bool:
        return self.num_bytes >= self.limit_bytes or self.num_read >= _READ_LIMIT

    def add(self, document: CleanText) -> bool:
        if document.key in self.texts:
            return False
        self.texts[document.key] = document.text
        self.num_bytes += sys.getsizeof(document.text)
        return True

    def frame(self) -> pl.DataFrame:
        texts = pl.Series(list(self.texts.values()), dtype=pl.String)
        return pl.DataFrame({**key_columns(list(self.texts)), "text": texts}).select(*KEY, "text")
