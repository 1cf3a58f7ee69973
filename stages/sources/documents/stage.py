"""Stage ``ingest``: text from files or the hub -> the ``documents`` table of token ids.

This file is the stage's configuration and reads what is prepared, so that ``plan`` and ``status``
start without ``datasets`` and ``transformers``; ``stages.sources.documents.work`` is the work.

``pack`` joins documents, each followed by the end-of-sequence token, and cuts the stream into rows
of exactly ``length`` tokens; the last piece of each split, shorter than that, is dropped and
counted as ``packing_remainder``. ``truncate`` makes one row of each document's first ``length``
tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from schemas.table import Table
from schemas.tables.documents import DOCUMENTS, Document
from stages.sources.documents.prepared import PreparedSource, read_shard_rows
from stages.sources.reading.source import Source
from stages.stage import OnProgress, SourceStage

SEGMENT_BYTES = 32 << 20  # of text held in memory at a time; changes no byte of the output


class IngestStage(SourceStage):
    """Read ``source``, clean, de-duplicate, split by content hash, tokenise, pack or truncate.

    ``tokenizer`` is a model folder. ``min_chars`` and ``max_chars`` bound a document's normalised
    text; ``max_chars`` also bounds memory, as a document is tokenised whole. ``max_rows`` keeps a
    sample of that many rows, train and held-out in proportion.
    """

    VERSION: ClassVar[int] = 1

    stage: Literal["ingest"]
    source: Source
    length: int = Field(ge=2)
    mode: Literal["pack", "truncate"]
    heldout_fraction: float = Field(ge=0.0, lt=1.0)
    min_chars: int = Field(default=1, ge=1)
    max_chars: int = Field(default=10_000_000, ge=1)
    rows_per_shard: int = Field(default=1024, ge=1)
    max_rows: int | None = Field(default=None, ge=2)

    @property
    def table(self) -> Table[Any]:
        """The table this stage writes."""
        return DOCUMENTS

    def source_identity(self) -> dict[str, Any]:
        """Return what is read of the source, and name, size and sha256 of each file, in order."""
        settings = self.source.model_dump(mode="json", exclude={"paths"})
        return {"source": settings | {"files": self.source.identity()}}

    def prepare(
        self,
        work_dir: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        on_progress: OnProgress | None = None,
    ) -> PreparedSource:
        """Do all the work, in ``work_dir``; returns at once where it is done already.

        ``on_progress`` is given a line of text each time a piece of the work is on disk.

        Resumes after an interruption, and starts afresh when the configuration or an input file
        (by size and time of change) is another one. Not for two processes at once.
        """
        from stages.sources.documents.work import (
            Preparation,  # loads datasets, polars, transformers
        )

        return Preparation(self, work_dir, segment_bytes, on_progress).run()

    def read(self, work_dir: Path, index: int) -> Iterator[Document]:
        """Yield the rows of shard ``index`` of a prepared ``work_dir``."""
        yield from read_shard_rows(work_dir, index)
