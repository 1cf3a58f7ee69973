"""Imported rows into shards of two tables: inputs, and what a teacher says of them, side by side.

Shard i of one holds the rows of shard i of the other. How many there are is known at the end: until
then they have working names, and the manifests are written last.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.executors.shard_task import installed_versions
from pipeline.planning.fingerprint import ADDRESS_DIGITS, fingerprint_of
from pipeline.state.step_lock import remove_torn_files
from schemas.storage.files import write_text
from schemas.storage.manifest import MANIFEST, Manifest, write_manifest
from schemas.storage.records import ShardRecord, shard_name, write_record
from schemas.storage.schema_file import write_schema_file
from schemas.storage.shards import ShardFile, write_shard
from schemas.table import BoundTable
from schemas.tables.documents import SPLITS
from schemas.tables.teacher_logits import TOP_K, TopKLogits
from stages.models.checkpoints.tokenizer_identity import (
    tokenizer_fingerprint,
    vocabulary_fingerprint,
)

SOURCE_REJECTS = "source.rejects.jsonl"  # as the sources of a recipe have it
_WORKING = "import-"  # what a shard is called until their number is known
ROWS_PER_SHARD = 512
ENTRIES_PER_SHARD = 16 << 20  # about 100 MB of ids and log-probs


@dataclass(frozen=True, slots=True)
class Place:
    """A table to be: where it lies, and the document whose hash names it."""

    root: Path
    table: str
    identity: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """The hash of the identity."""
        return fingerprint_of(self.identity)

    @property
    def folder(self) -> Path:
        """The table's folder, as a recipe's root has it."""
        return self.root / self.table / self.fingerprint[:ADDRESS_DIGITS]

    def clear(self) -> None:
        """Remove what an interrupted import left; of a finished table nothing that is its own.

        Inputs may be finished, by an import that was told of another teacher: they are written
        again, each file in one step and with the bytes that it has.
        """
        remove_torn_files(self.folder)
        is_finished = (self.folder / MANIFEST).is_file()
        for left in self.folder.glob(f"{_WORKING}*" if is_finished else "[!.]*"):  # the lock stays
            left.unlink()


@dataclass(slots=True)
class _Part:
    """One written shard of a split, of inputs or signals, under its working name."""

    file: Path
    written: ShardFile
    num_tokens: int
    num_positions: int


@dataclass(slots=True)
class TablePair:
    """Both tables while they are written; ``finish`` completes them."""

    inputs: Place
    signals: Place
    bound: BoundTable[Any]
    k: int
    parts: dict[str, list[tuple[_Part, _Part]]] = field(
        default_factory=lambda: {split: [] for split in SPLITS}
    )
    pending: dict[str, list[tuple[Any, TopKLogits]]] = field(
        default_factory=lambda: {split: [] for split in SPLITS}
    )
    num_entries: Counter[str] = field(default_factory=Counter)

    def add(self, row: Any, signal: TopKLogits) -> None:
        """Take a row of inputs and its distributions; they are written when they fill a shard."""
        self.pending[row.split].append((row, signal))
        self.num_entries[row.split] += signal.token_ids_PK.size
        is_full = self.num_entries[row.split] >= ENTRIES_PER_SHARD
        if is_full or len(self.pending[row.split]) == ROWS_PER_SHARD:
            self._flush(row.split)

    @property
    def bounds(self) -> tuple[BoundTable[Any], BoundTable[Any]]:
        """Both tables with their sizes known."""
        return self.bound, TOP_K.bind(vocab_size=self.bound.vocab_size, sizes={"K": self.k})

    def _flush(self, split: str) -> None:
        if not self.pending[split]:
            return
        number = len(self.parts[split])
        made = []
        columns = zip(*self.pending[split], strict=True)
        for place, bound, rows in zip(
            (self.inputs, self.signals), self.bounds, columns, strict=True
        ):
            file = place.folder / f"{_WORKING}{split}-{number:06d}.arrow"
            tokens = sum(row.num_tokens for row in rows)
            positions = sum(row.num_positions for row in rows)
            made.append(_Part(file, write_shard(file, bound, rows), tokens, positions))
        self.parts[split].append((made[0], made[1]))
        self.pending[split].clear()
        self.num_entries[split] = 0

    def finish(
        self,
        tokenizer: Path,
        rejects: Mapping[str, int],
        rejected: Sequence[Mapping[str, str]],
        notes: Mapping[str, Any],
    ) -> None:
        """Give the shards their names, and write records, rejects and both manifests."""
        for split in SPLITS:
            self._flush(split)
        pairs = [(split, pair) for split in SPLITS for pair in self.parts[split]]
        if rejected:
            lines = [json.dumps(dict(row), sort_keys=True) + "\n" for row in rejected]
            write_text(self.inputs.folder / SOURCE_REJECTS, "".join(lines))
        for side, (place, bound) in enumerate(
            zip((self.inputs, self.signals), self.bounds, strict=True)
        ):
            records = []
            for index, (split, pair) in enumerate(pairs):
                part, name = pair[side], shard_name(index, len(pairs))
                record = ShardRecord(
                    name=name,
                    split=split,
                    num_rows=part.written.num_rows,
                    num_tokens=part.num_tokens,
                    num_positions=part.num_positions,
                    num_bytes=part.written.num_bytes,
                    sha256=part.written.sha256,
                )
                part.file.rename(place.folder / record.file)
                said = {**notes, "fingerprint": place.fingerprint, "versions": installed_versions()}
                write_record(place.folder, record, said)
                records.append(record)
            _write_manifest(place, bound, records, tokenizer, {} if side else rejects)


def _write_manifest(
    place: Place,
    bound: BoundTable[Any],
    records: Sequence[ShardRecord],
    tokenizer: Path,
    rejects: Mapping[str, int],
) -> None:
    fingerprint = tokenizer_fingerprint(tokenizer)
    settings = place.identity["config"]
    write_schema_file(place.folder, bound, tokenizer=fingerprint, settings=settings)
    write_manifest(
        place.folder,
        Manifest(
            table=bound.table.name,
            version=bound.table.version,
            variant=bound.table.variant,
            fingerprint=place.fingerprint,
            tokenizer=fingerprint,
            vocabulary=vocabulary_fingerprint(tokenizer),
            vocab_size=bound.vocab_size,
            identity=place.identity,
            shards=tuple(records),
            source_rejects=dict(rejects),
        ),
    )
