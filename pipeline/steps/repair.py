"""Damaged shards of finished tables, found by their checksums and made again by the step's work.

Nothing else of the table is written: what verifies stays, and so does the manifest, whose checksums
the new bytes have to meet. Where an engine's last bits have moved since (another version, another
machine), they do not; then the manifest is written anew, and what was made of the old bytes is
named: its own fingerprint does not say it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.planning.plan import PlannedStep, needs
from pipeline.planning.recipe import Execution
from pipeline.state.step_lock import remove_torn_files, step_lock
from pipeline.state.step_state import Progress, finished_manifest, is_done
from pipeline.steps.repeated_rows import without_repeated
from pipeline.steps.reporter import Reporter
from pipeline.steps.run import step_named
from pipeline.steps.table_step import made_by, make_again
from schemas.errors import StoreError
from schemas.open_table import known_table
from schemas.storage.files import Folder, at_once, sha256_of
from schemas.storage.manifest import MANIFEST, Manifest, write_manifest
from schemas.storage.object_path import ObjectPath
from schemas.storage.records import ShardRecord
from schemas.storage.shard_list import ShardList
from stages.file_map import FileMapStage
from stages.sources.finished_table.stage import FinishedTableStage


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was done to one table: names of shards and side files that were made again.

    ``moved`` are those whose bytes are others than before, ``stale`` the finished steps that were
    made of the old ones.
    """

    num_shards: int
    made: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()

    def lines(self, step: str) -> Iterator[str]:
        """Say what was done to the table of a step."""
        if not self.made:
            yield f"{step}: all of its {self.num_shards:,} shards are whole"
            return
        yield f"{step}: made again: {', '.join(self.made)}; the rest is whole"
        if not self.moved:
            yield f"{step}: with the bytes they had"
            return
        yield (
            f"{step}: other bytes than before, with as many rows (an engine or a library that "
            f"rounds otherwise): {', '.join(self.moved)}; its manifest is new"
        )
        if self.stale:
            yield (
                f"{step}: made of the old bytes: {', '.join(self.stale)}; to have them of the new "
                f"ones, delete their folders (`teachercache plan` names them) and run again"
            )


def repair_step(
    plan: Sequence[PlannedStep], step: PlannedStep, execution: Execution, reporter: Reporter
) -> Repaired | None:
    """Make what is damaged of one step's table again; None for a step without a finished table.

    Raises StoreError where the input is damaged too or has gone, or where what is made again has
    other rows.
    """
    if not step.writes_table or finished_manifest(step) is None:
        return None
    with step_lock(step.place, warned=reporter.warned):
        manifest = finished_manifest(step)
        if manifest is None:
            return None
        shards, files = _damaged(step.place, manifest)
        if not shards and not files:
            return Repaired(len(manifest.shards))
        names = (*(manifest.shards[index].file for index in shards), *files)
        if isinstance(step.stage, FinishedTableStage):
            raise StoreError(
                f"{step.place / names[0]} is damaged ({len(names)} files in all), and step "
                f"'{step.name}' only reads that table: repair it by the recipe that makes it"
            )
        step_named(plan, step.name)  # refuses one whose input or model is not there
        remove_torn_files(step.place)
        why = f"{len(names)} damaged or missing files (first: {names[0]})"
        reporter.step_started(step, Progress("partial", why))
        reporter.shards_expected(len(shards), 0)
        repaired = _repaired(step, manifest, shards, execution, reporter)
        moved = [manifest.shards[i].file for i in shards if repaired[i] != manifest.shards[i]]
        if still := [name for name in files if not _is_whole(step.place, name, manifest)]:
            raise StoreError(
                f"{step.place / still[0]} made again is not what it was: its model has changed; "
                f"delete {step.place / MANIFEST} and run the recipe"
            )
        if moved:
            write_manifest(step.place, replace(manifest, shards=ShardList.of(repaired)))
    reporter.step_finished(step)
    stale = _made_of(plan, step) if moved else ()
    return Repaired(len(manifest.shards), names, tuple(moved), stale)


def _damaged(folder: Folder, manifest: Manifest) -> tuple[list[int], list[str]]:
    """Return the shards, by index, and the side files that are gone or have changed."""
    shards = list(manifest.shards)
    whole = at_once(lambda shard: _has(folder / shard.file, shard.sha256), shards)
    files = [name for name in manifest.files if not _is_whole(folder, name, manifest)]
    return [index for index, is_whole in enumerate(whole) if not is_whole], files


def _is_whole(folder: Folder, name: str, manifest: Manifest) -> bool:
    return _has(folder / name, manifest.files[name])


def _has(path: Folder, sha256: str) -> bool:
    """Whether a file has these bytes; of an object, the checksum that was stored with it says."""
    if isinstance(path, ObjectPath):
        info = path.info()
        return info is not None and (info.sha256 or path.sha256()) == sha256
    return path.is_file() and sha256_of(path) == sha256


def _repaired(
    step: PlannedStep,
    manifest: Manifest,
    damaged: Sequence[int],
    execution: Execution,
    reporter: Reporter,
) -> list[ShardRecord]:
    """Return the records of all shards; each that was made again has the rows it had."""
    made = make_again(step, damaged, len(manifest.shards), execution, reporter)
    records = [made.get(index, record) for index, record in enumerate(manifest.shards)]
    if isinstance(step.stage, FileMapStage):
        table = known_table(manifest, step.place)
        bound = table.bind(vocab_size=manifest.vocab_size)
        shards, notes = ShardList.of(records), made_by(step)
        said = reporter.said
        records = list(without_repeated(step.place, bound, shards, made_by=notes, said=said))
    for index in damaged:
        before, now = manifest.shards[index], records[index]
        if _counts(before) != _counts(now):
            raise StoreError(
                f"{step.place / before.file} made again is {_spelt(now)}, its manifest says "
                f"{_spelt(before)}: its input or a library reads otherwise now; delete "
                f"{step.place / MANIFEST} and run the recipe for a table of what it is now"
            )
    return records


def _counts(record: ShardRecord) -> ShardRecord:
    return replace(record, num_bytes=0, sha256="")


def _spelt(record: ShardRecord) -> str:
    rejected = sum(record.rejects.values())
    return f"{record.num_rows} rows of {record.num_tokens} tokens and {rejected} rejected"


def _made_of(plan: Sequence[PlannedStep], step: PlannedStep) -> tuple[str, ...]:
    """Return the finished steps of a plan that were made of a step, at once or by others."""
    stale = [step]
    for other in plan:
        if other not in stale and any(needed in stale for needed in needs(plan, other)):
            stale.append(other)
    return tuple(other.name for other in stale[1:] if is_done(other))
