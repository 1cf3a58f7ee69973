"""Check finished tables and checkpoints: nothing missing, no byte changed, every row readable."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from pipeline.cache.signal_inputs import Source, misplaced_row, source_of
from schemas.errors import ConfigError, TeacherCacheError
from schemas.open_table import contradicted, known_table
from schemas.row_checks import contradiction_in
from schemas.storage.files import Folder, sha256_of
from schemas.storage.manifest import MANIFEST, Manifest, damaged_shards, read_manifest
from schemas.storage.object_path import ObjectPath
from schemas.storage.records import ShardRecord
from schemas.storage.shards import read_shard, rows_of_batch
from schemas.table import Table
from stages.models.checkpoints.checkpoint import CHECKPOINT, damaged_files, read_record
from stages.signals.teacher_logits.calibration import CALIBRATION, other_taus


def verify_folders(folders: Sequence[Folder], console: Console) -> list[str]:
    """Verify each table or checkpoint at or below ``folders``; print and return what is wrong."""
    problems: list[str] = []
    for folder in _finished_folders(folders):
        found = verify_folder(folder)
        problems.extend(found)
        verdict = "ok" if not found else f"{len(found)} problems"
        console.print(f"{folder}: {verdict}", markup=False, highlight=False, soft_wrap=True)
        for problem in found:
            console.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
    if problems:
        console.print(
            "to mend a table, `teachercache repair` its recipe (what verifies is kept); to mend a "
            "checkpoint, delete its folder and run again",
            highlight=False,
            soft_wrap=True,
        )
    return problems


def _finished_folders(folders: Sequence[Folder]) -> list[Folder]:
    files = [path for folder in folders for path in _files_below(folder)]
    found = sorted({path.parent for path in files}, key=str)
    if not found:
        places = ", ".join(map(str, folders))
        raise ConfigError(f"nothing finished at or below {places}: no {MANIFEST} or {CHECKPOINT}")
    return found


def _files_below(folder: Folder) -> Iterator[Folder]:
    """Yield the manifests and checkpoint records; in an object store they are listed."""
    if isinstance(folder, ObjectPath):
        yield from (path for path in folder.find() if path.name in (MANIFEST, CHECKPOINT))
    else:
        yield from (path for name in (MANIFEST, CHECKPOINT) for path in folder.rglob(name))


def verify_folder(folder: Folder) -> list[str]:
    """Return one line for each thing wrong with one finished table or checkpoint."""
    try:
        if (folder / CHECKPOINT).is_file():
            return damaged_files(folder, read_record(folder))
        manifest = read_manifest(folder)
        if isinstance(folder, ObjectPath):
            return _problems_in_store(folder, manifest, known_table(manifest, folder))
        if damaged := damaged_shards(folder, manifest):
            return damaged
        table = known_table(manifest, folder)
    except TeacherCacheError as error:
        return [str(error)]
    looked_at = _Table(folder, manifest, table)
    problems = _other_taus(folder, manifest)
    for shard in manifest.shards:
        problems.extend(_shard_problems(folder / shard.file, shard, looked_at))
    return problems


def _other_taus(folder: Folder, manifest: Manifest) -> list[str]:
    if CALIBRATION not in manifest.files:
        return []
    return list(other_taus(folder, [shard.name for shard in manifest.shards]))


class _Table:
    """A table that is verified: what it was made of, and the ids of its rows seen so far."""

    def __init__(self, folder: Folder, manifest: Manifest, table: Table[Any]) -> None:
        self.folder, self.manifest, self.table = folder, manifest, table
        self.source: Source | None = source_of(folder, manifest)
        self.seen: set[str] = set()


def _problems_in_store(folder: ObjectPath, manifest: Manifest, table: Table[Any]) -> list[str]:
    """Fetch each shard once, whatever copies of it this machine has, and look at it here."""
    problems = damaged_shards(folder, replace(manifest, shards=()))
    if not problems:
        problems = _other_taus(folder, manifest)
    looked_at = _Table(folder, manifest, table)
    with tempfile.TemporaryDirectory(prefix="teachercache-") as scratch:
        for shard in manifest.shards:
            path, file = folder / shard.file, Path(scratch) / shard.file
            info = path.info()
            if info is None:
                problems.append(f"{path} is missing")
                continue
            path.download(file, info.num_bytes)
            if (found := sha256_of(file)) != shard.sha256:
                says = f"the manifest says {shard.sha256[:12]}"
                problems.append(f"{path} has sha256 {found[:12]}, {says}")
            else:
                problems.extend(_shard_problems(file, shard, looked_at))
            file.unlink()
    return problems


def _shard_problems(file: Path, shard: ShardRecord, looked_at: _Table) -> Iterator[str]:
    """Yield what is wrong in one shard; the ids of its rows are added to those seen."""
    manifest, table, seen = looked_at.manifest, looked_at.table, looked_at.seen
    path = looked_at.folder / shard.file
    content = read_shard(file)
    expected = {b"table": manifest.table, b"version": str(manifest.version)}
    found = content.schema.metadata or {}
    for key, value in expected.items():
        if found.get(key, b"").decode() != value:
            yield f"{path} says {key.decode()} {found.get(key, b'').decode()}, expected {value}"
    if content.num_rows != shard.num_rows:
        yield f"{path} has {content.num_rows} rows, its record says {shard.num_rows}"
    try:
        wrong = list(_contradictions(content, path, table, manifest.vocab_size, shard.split))
        yield from wrong
        if wrong:
            return
        positions, tokens, ids = _count(content, table)
    except (ValueError, TeacherCacheError) as error:
        yield f"{path}: {error}"
        return
    if positions != shard.num_positions or tokens != shard.num_tokens:
        yield (
            f"{path} has {tokens} tokens and {positions} positions, its record says "
            f"{shard.num_tokens} and {shard.num_positions}"
        )
    if looked_at.source is not None:
        misplaced = misplaced_row(content, table, shard, looked_at.source)
        if misplaced is not None:
            yield contradicted(path, *misplaced)
    if len(ids) != content.num_rows:
        yield f"{path} has {content.num_rows - len(ids)} repeated sample_ids"
    if again := ids & seen:
        yield f"{path} has {len(again)} sample_ids of the shards before it, {min(again)} is one"
    seen |= ids


def _contradictions(
    content: pa.Table, path: Folder, table: Table[Any], vocab_size: int, split: str
) -> Iterator[str]:
    """Yield a line for each record batch with a row that its own bytes contradict."""
    first = 0
    for number, batch in enumerate(content.to_batches()):
        if batch.num_rows != (expected := rows_of_batch(content.num_rows, number)):
            yield f"{path}: record batch {number} has {batch.num_rows} rows, expected {expected}"
            return
        columns = {name: table.column_values(batch, name) for name in table.columns}
        found = contradiction_in(batch, columns, table, vocab_size, split, thorough=True)
        if found is not None:
            sample_id = columns["sample_id"][found.row]
            yield contradicted(path, first + found.row, sample_id, found.problem)
        first += batch.num_rows


def _count(content: pa.Table, table: Table[Any]) -> tuple[int, int, set[str]]:
    positions, tokens, ids = 0, 0, set()
    for batch in content.to_batches():
        for row in table.rows(batch):
            positions += row.num_positions
            tokens += row.num_tokens
            ids.add(row.sample_id)
    return positions, tokens, ids
