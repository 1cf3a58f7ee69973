"""Read a peer's folder into two tables of a root: its rows, and what a teacher says of them.

What the teacher was nobody here can check: the manifest has what the person says of it. Tables are
named by the content of the files and by what they were told, so a second import finds them there.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.imports.axolotl import Axolotl
from pipeline.imports.distillkit import DistillKit
from pipeline.imports.peer import Peer
from pipeline.imports.peer_files import PeerFile, array_of, peer_files
from pipeline.imports.peer_row import PeerRow
from pipeline.imports.tables import Place, TablePair
from pipeline.planning.fingerprint import vocab_size_of
from pipeline.state.step_lock import step_lock
from schemas.errors import ConfigError, StoreError, first_line
from schemas.sample_id import sample_id_of
from schemas.storage.checksums import remembered_sha256
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest, manifest_if_there
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.documents import DOCUMENTS, SPLITS
from schemas.tables.teacher_logits import TOP_K
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.sources.reading.rejects import MalformedRecord, Rejects, UnusableRecord

PEERS: dict[str, type[Peer]] = {"axolotl": Axolotl, "distillkit": DistillKit}
VERSION = 2  # raise it when equal files and settings give other bytes
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import made, or found made: both folders, and both manifests."""

    inputs: Path
    signals: Path
    inputs_manifest: Manifest
    signals_manifest: Manifest
    next_token_share: float | None  # of positions, that have it among the K; None: not made now
    num_rescaled: int = 0  # positions that a codec let sum above one

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each split."""
        counts: Counter[str] = Counter()
        for shard in self.inputs_manifest.shards:
            counts[shard.split] += shard.num_rows
        return {split: counts[split] for split in SPLITS}

    def lines(self) -> Iterator[str]:
        """Say what was made, what was left out, and what nobody knows."""
        rows = ", ".join(f"{split} {count:,}" for split, count in self.rows.items())
        config = self.signals_manifest.identity["config"]
        state = "" if self.next_token_share is not None else " (was there already)"
        yield f"{self.inputs}: {self.inputs_manifest.table}, rows: {rows}{state}"
        yield (
            f"{self.signals}: teacher_logits, top_k, {self.signals_manifest.num_positions:,} "
            f"positions, teacher: {config['teacher']}{state}"
        )
        for reason, count in self.inputs_manifest.rejects.items():
            yield f"rejected: {count:,} x {reason}"
        if self.next_token_share is not None:
            yield (
                f"the next token is among the kept ones at {self.next_token_share:.1%} of "
                f"positions; where that is low, entries are of other tokens or another tokenizer"
            )
        if self.num_rescaled:
            yield (
                f"divided by their sum: {self.num_rescaled:,} positions, whose probabilities the "
                f"peer's compression let sum above one"
            )
        yield (
            "log-probs sum to one over the kept tokens: the mass outside them was dropped before "
            "the import, and none is recorded"
            if config["renormalised"]
            else "not known: entropies, and the next token's log-prob where it is not kept"
        )


def import_tables(
    folder: Folder,
    root: Folder,
    *,
    peer: str,
    tokenizer: Folder,
    teacher: str | None,
    heldout_fraction: float,
) -> Imported:
    """Import the rows of ``folder`` into ``root``; see the module.

    ``tokenizer`` is the model folder whose ids the rows hold. Where the files say of no split which
    rows are held out, ``heldout_fraction`` of them are, by their content. Raises ConfigError for
    what cannot be read as that peer's, and where no row is left.
    """
    if peer not in PEERS:
        raise ConfigError(f"--from is '{peer}', expected one of {', '.join(PEERS)}")
    for named in (folder, root, tokenizer):
        if not isinstance(named, Path):
            raise ConfigError(
                f"{named} is in an object store, rows are imported on this machine: name folders "
                f"here, and copy the tables"
            )
    assert isinstance(folder, Path) and isinstance(root, Path) and isinstance(tokenizer, Path)
    if not 0 <= heldout_fraction < 1:
        raise ConfigError(
            f"--heldout-fraction is {heldout_fraction}, expected at least 0 and below 1"
        )
    job = _Import.opened(folder, root.absolute(), peer, tokenizer, teacher, heldout_fraction)
    with ExitStack() as locks:
        for place in (job.inputs, job.signals):
            locks.enter_context(step_lock(place.folder))
        found = job.finished()
        return found if found is not None else job.carry_out()


@dataclass(slots=True)
class _Import:
    folder: Path
    tokenizer: Path
    files: list[PeerFile]
    peer: Peer
    vocab_size: int
    heldout_fraction: float
    inputs: Place
    signals: Place
    rejects: Rejects = field(default_factory=Rejects)
    num_next: int = 0
    num_rescaled: int = 0
    num_positions: int = 0

    @classmethod
    def opened(
        cls,
        folder: Path,
        root: Path,
        name: str,
        tokenizer: Path,
        teacher: str | None,
        heldout_fraction: float,
    ) -> "_Import":
        """Look at the files, and name what will be made of them."""
        files = peer_files(folder)
        peer = PEERS[name](folder, files)
        vocab_size = vocab_size_of(tokenizer)
        table = CONVERSATIONS if _leaves_out(files, peer) else DOCUMENTS
        is_split = bool(files[0].split)
        config = {
            "from": name,
            "files": {file.name: remembered_sha256(file.path) for file in files},
            "settings": peer.settings,
            "heldout_fraction": None if is_split else heldout_fraction,
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        common = {"stage": "import", "version": VERSION, "vocab_size": vocab_size}
        identity = common | {
            "config": config,
            "table": [table.name, table.version, table.variant],
            "inputs": [],
            "models": [],
        }
        inputs = Place(root, table.name, identity)
        about = {
            "teacher": teacher or UNKNOWN,
            "renormalised": peer.is_renormalised,
            "encoding": {"kind": TOP_K.variant},
        }
        identity = common | {
            "config": config | about,
            "table": [TOP_K.name, TOP_K.version, TOP_K.variant],
            "inputs": [inputs.fingerprint],
            "models": [],
        }
        signals = Place(root, TOP_K.name, identity)
        fraction = 0.0 if is_split else heldout_fraction
        return cls(folder, tokenizer, files, peer, vocab_size, fraction, inputs, signals)

    def finished(self) -> Imported | None:
        """Return the tables that are there already, None where one is not."""
        manifests = [manifest_if_there(place.folder) for place in (self.inputs, self.signals)]
        inputs, signals = manifests
        if inputs is None or signals is None:
            return None
        share = self.num_next / self.num_positions if self.num_positions else None
        folders = self.inputs.folder, self.signals.folder
        return Imported(*folders, inputs, signals, share, self.num_rescaled)

    def carry_out(self) -> Imported:
        """Write both tables; raises StoreError where the disk refuses."""
        try:
            for place in (self.inputs, self.signals):
                place.clear()
            pair = self._written()
            if pair is None:
                raise ConfigError(f"{self.folder}: no row could be imported: {self._why()}")
            rejects = dict(sorted(self.rejects.counts.items()))
            read_from = str(self.folder.absolute())
            notes = {"read_from": read_from, "rescaled_positions": self.num_rescaled}
            pair.finish(self.tokenizer, rejects, self.rejects.listed, notes)
        except OSError as error:
            raise StoreError(
                f"cannot write {self.inputs.root}: {error.strerror or first_line(error)}; run the "
                f"import again, what is unfinished is made anew"
            ) from error
        made = self.finished()
        assert made is not None
        return made

    def _written(self) -> TablePair | None:
        table = {each.name: each for each in (DOCUMENTS, CONVERSATIONS)}[self.inputs.table]
        bound = table.bind(vocab_size=self.vocab_size)
        pair: TablePair | None = None
        seen: set[str] = set()
        for file, place, found in self._rows():
            if pair is None:
                pair = self._begun(bound, found, place)
            if pair is None:
                continue
            with self.rejects.passing(place):
                row = found.checked(
                    k=pair.k,
                    vocab_size=self.vocab_size,
                    is_renormalised=self.peer.is_renormalised,
                )
                split = self._split(file, row)
                made = row.document(split) if table is DOCUMENTS else row.conversation(split)
                if made.sample_id in seen:
                    raise UnusableRecord("equal to an earlier row", f"sample {made.sample_id}")
                seen.add(made.sample_id)
                signals = row.signals(made.sample_id, is_renormalised=self.peer.is_renormalised)
                pair.add(made, signals)
                num_next, num_positions = row.share_of_next
                self.num_next += num_next
                self.num_rescaled += row.num_rescaled
                self.num_positions += num_positions
        return pair

    def _begun(self, bound: Any, row: PeerRow, place: str) -> TablePair | None:
        """Return the tables, of the K of the first row that is sound in itself."""
        k = row.token_ids_PK.shape[1]
        try:
            row.checked(k=k, vocab_size=self.vocab_size, is_renormalised=self.peer.is_renormalised)
        except UnusableRecord as error:
            self.rejects.add(place, error)
            return None
        return TablePair(self.inputs, self.signals, bound, k)

    def _rows(self) -> Iterator[tuple[PeerFile, str, PeerRow]]:
        """Yield each row with its file and place; records that are none are counted."""
        for file in self.files:
            number = 0
            for batch in file.batches(self.peer.columns(file.schema)):
                for record in _records(batch):
                    place = f"{file.path}:{number}"
                    number += 1
                    self.rejects.num_read += 1
                    rows: list[PeerRow] = []
                    with self.rejects.passing(place):
                        rows = self.peer.rows(record)
                    for row in rows:
                        yield file, place, row

    def _split(self, file: PeerFile, row: PeerRow) -> str:
        if file.split:
            return file.split
        key = int(sample_id_of(row.input_ids_T)[:16], 16)
        return "heldout" if key < int(self.heldout_fraction * 2**64) else "train"

    def _why(self) -> str:
        if not self.rejects.counts:
            return "its files have no rows"
        reason, count = self.rejects.counts.most_common(1)[0]
        first = next(row for row in self.rejects.listed if row["reason"] == reason)
        return f"{count:,} x '{reason}', first {first['place']}: {first['detail']}"


def _records(batch: pa.RecordBatch) -> Iterator[Mapping[str, pa.Scalar]]:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for index in range(batch.num_rows):
        yield {name: column[index] for name, column in columns.items()}


def _leaves_out(files: list[PeerFile], peer: Peer) -> bool:
    """Whether some row's labels leave tokens out, which makes the rows ``conversations``."""
    for file in files:
        if "labels" not in file.schema.names:
            continue
        for batch in file.batches(["labels"]):
            labels = []
            for value in batch.column(0):
                try:
                    labels.append(array_of(value, "labels", np.int64))
                except MalformedRecord:  # it will be rejected
                    continue
            if peer.leaves_out(labels):
                return True
    return False
