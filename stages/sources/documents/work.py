"""Ingest in three phases, each a pass over the data in bounded memory, each resumable.

1. *documents*: stream the source, reject what is unusable, and spool the rest by content key.
2. *sequences*: for each range of content keys, drop duplicates, split train from held-out by the
   key, tokenise, pack or truncate, and spool the rows by ``sample_id``.
3. *rows*: for each range of ``sample_id``, drop rows with equal token ids (two documents with one
   beginning, say; a row in both splits stays in train) and write the rest in order.

Documents are packed in the order of their content keys and rows come out in the order of their
``sample_id``, both hashes: so the bytes depend on neither the number of ranges, the machine, nor
any interruption, and the order of input files decides only which spelling of a duplicate is kept.

Memory: one segment or range (32 MiB of text by default, up to 128 GiB of input; beyond that a range
is 1/4096 of the input), plus the largest document and its tokens. Disk: the de-duplicated text,
then twice its token ids, compressed. Measured (benchmarks/ingest/ingest_memory.py, 2026-11): peak
889 MB for 2 GB of jsonl, 837 MB for 200 MB, 671 MB for 2 MB, most of it libraries; 2 GB of which a
fifth was distinct took 340 CPU seconds.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import ConfigError
from schemas.storage.files import write_text
from schemas.tables.documents import SPLITS, Document
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.sources.documents.document_spool import spool_documents
from stages.sources.documents.prepared import (
    PreparedSource,
    read_prepared,
    read_shard_rows,
    write_prepared,
)
from stages.sources.documents.sequence_spool import spool_sequences
from stages.sources.documents.sequences import ROWS, SCHEMA, count_rows, range_path, write_sequences
from stages.sources.documents.spool import KEY, Spool, num_ranges
from stages.sources.documents.stage import IngestStage
from stages.sources.documents.tally import Tally
from stages.sources.prepared import PREPARED, cut_shards, within
from stages.sources.reading.source import COMPRESSIONS, HubRows, Source
from stages.sources.reading.tokens import TextTokenizer
from stages.stage import OnProgress

SEGMENT_BYTES = 32 << 20  # of text held in memory at a time; changes no byte of the output
DOCUMENTS, SEQUENCES = "documents", "sequences"
WORK = "work.json"  # names what the work in progress belongs to; written first
_HUB_BYTES = 64 << 30  # the size of a hub data set is not known beforehand
_GROWTH = 4  # text in memory per byte on disk, of a compressed file


def prepare(
    stage: IngestStage,
    work_dir: Path,
    on_progress: OnProgress | None = None,
    *,
    segment_bytes: int = SEGMENT_BYTES,
) -> PreparedSource:
    """Do all the work, in ``work_dir``; returns at once where it is done already.

    Resumes after an interruption, and starts afresh when the configuration or an input file (by
    size and time of change) is another one. ``segment_bytes`` of text are held in memory at a time.
    """
    return Preparation(stage, work_dir, segment_bytes, on_progress).run()


def read(work_dir: Path, index: int) -> Iterator[Document]:
    """Yield the rows of one shard, in order; raises StoreError where nothing is prepared."""
    yield from read_shard_rows(work_dir, index)


class Preparation:
    """One ingest in one working folder."""

    def __init__(
        self,
        stage: IngestStage,
        work_dir: Path,
        segment_bytes: int,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Open the tokenizer and find the files; raises ConfigError where either will not do."""
        self.stage = stage
        self.work_dir = work_dir
        self.segment_bytes = segment_bytes
        self.on_progress = on_progress or (lambda line: None)
        self.files = stage.source.files()
        self.ranges = num_ranges(text_bytes(stage.source, self.files), segment_bytes)
        self.tokenizer = TextTokenizer(Path(stage.tokenizer).expanduser())
        self.tokenizer.require(length=stage.length, eos=stage.mode == "pack")
        self._require_room()

    def run(self) -> PreparedSource:
        """Do what is not done yet.

        Raises ConfigError where no row is left in a split, RejectLimitError where too many records
        are malformed: raising the limit goes on with what was read.
        """
        self._claim()
        prepared = read_prepared(self.work_dir)
        if prepared is None:
            sequences = self._sequences()
            shutil.rmtree(self.work_dir / DOCUMENTS, ignore_errors=True)
            prepared = self._rows(sequences)
            write_prepared(self.work_dir, prepared)
        shutil.rmtree(self.work_dir / SEQUENCES, ignore_errors=True)
        return prepared

    def _require_room(self) -> None:
        first = self.tokenizer.first_ids(self.stage.bos)
        if len(first) >= self.stage.length:
            raise ConfigError(
                f"length: got {self.stage.length}, but {len(first)} tokens of a row are what the "
                f"tokenizer puts first: raise it, or use bos: never"
            )

    def _claim(self) -> None:
        """Keep work that was begun for this very input and configuration; clear any other."""
        ours = json.dumps(self._identity(), sort_keys=True, indent=1) + "\n"
        marker = self.work_dir / WORK
        if marker.is_file() and marker.read_text(encoding="utf-8") == ours:
            for leftover in self.work_dir.glob("*/*.tmp-*"):
                leftover.unlink(missing_ok=True)
            return
        (self.work_dir / PREPARED).unlink(missing_ok=True)
        for folder in (DOCUMENTS, SEQUENCES, ROWS):
            shutil.rmtree(self.work_dir / folder, ignore_errors=True)
        write_text(marker, ours)

    def _identity(self) -> dict[str, object]:
        stats = [(path, path.stat()) for path in self.files]
        return {
            "version": self.stage.VERSION,
            "stage": self.stage.model_dump(mode="json", exclude=set(self.stage.NOT_HASHED)),
            "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
            "tokenizer": tokenizer_fingerprint(self.tokenizer.folder),
            "ranges": self.ranges,
        }

    def _sequences(self) -> Spool:
        """Return the finished spool of rows; its state holds the tally."""
        sequences = Spool(self.work_dir / SEQUENCES, 1)
        if sequences.num_segments == sequences.ranges:
            return sequences
        documents = Spool(self.work_dir / DOCUMENTS, self.ranges)
        tally = spool_documents(documents, self.stage, self.segment_bytes, self.on_progress)
        tally.rejects.require_within(self.stage.max_rejected_fraction)
        # The spooled text is now known: far less than the source where most of it is duplicates.
        ranges = min(documents.ranges, num_ranges(documents.num_segments, 1))
        sequences = Spool(self.work_dir / SEQUENCES, ranges)
        spool_sequences(
            documents,
            sequences,
            self.stage,
            tokenizer=self.tokenizer,
            tally=tally,
            on_progress=self.on_progress,
        )
        return sequences

    def _rows(self, sequences: Spool) -> PreparedSource:
        assert sequences.state is not None
        tally = Tally.from_json(sequences.state["tally"])
        counts = [self._rows_of_range(sequences, number) for number in range(sequences.ranges)]
        by_range = dict(zip(SPLITS, zip(*counts, strict=True), strict=True))
        rows = {split: sum(by_range[split]) for split in SPLITS}
        tally.reject("duplicate_sequence", tally.rows_made - sum(rows.values()))
        self._require_rows(rows, tally)
        kept = within(rows, self.stage.max_rows)
        tally.reject("beyond_max_rows", sum(rows.values()) - sum(kept.values()))
        return PreparedSource(
            shards=cut_shards(kept, self.stage.rows_per_shard),
            rejects=dict(sorted(tally.rejects.counts.items())),
            rejected=tuple(tally.rejects.listed),
            documents_read=tally.documents_read,
            truncated=tally.truncated,
            rows_by_range=by_range,
        )

    def _rows_of_range(self, sequences: Spool, number: int) -> tuple[int, int]:
        """Write the rows of one range, unless they are there; return train and held-out counts."""
        path = range_path(self.work_dir, number)
        if path.is_file():
            return count_rows(path)
        found = sequences.read_ranges(number, number + 1)
        if found.height == 0:
            return 0, 0
        first = found.sort(*KEY, "heldout").unique(KEY, keep="first", maintain_order=True)
        rows = first.sort("heldout", *KEY).select(SCHEMA.names)
        write_sequences(path, rows.to_arrow())
        num_heldout = int(rows["heldout"].sum())
        return rows.height - num_heldout, num_heldout

    def _require_rows(self, rows: dict[str, int], tally: Tally) -> None:
        wanted = SPLITS if self.stage.heldout_fraction > 0 else SPLITS[:1]
        for split in wanted:
            if rows[split] == 0:
                reasons = ", ".join(f"{why} {n}" for why, n in sorted(tally.rejects.counts.items()))
                raise ConfigError(
                    f"no {split} row is left of {tally.documents_read} documents "
                    f"(rejected: {reasons or 'none'}); give more text, or lower length or "
                    f"min_chars, or change heldout_fraction ({self.stage.heldout_fraction})"
                )


def text_bytes(source: Source, files: tuple[Path, ...]) -> int:
    """Return about how much text the source holds; it sets the number of ranges alone."""
    if isinstance(source, HubRows):
        return _HUB_BYTES
    grows = {".parquet", *COMPRESSIONS}
    return sum(path.stat().st_size * (_GROWTH if path.suffix in grows else 1) for path in files)
