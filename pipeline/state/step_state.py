"""How far a step is: done, begun or not, and what it comes to."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from pipeline.planning.fingerprint import hidden_size_of, vocab_size_of
from pipeline.planning.plan import PlannedStep
from schemas.errors import StoreError
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest, manifest_if_there
from schemas.storage.records import all_notes, count_records, shard_name
from schemas.tables.teacher_logits import EXACT_INT8
from stages.file_map import FileMapStage
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.signals.teacher_logits.calibration import Calibration, read_calibration
from stages.signals.teacher_logits.rounding_cost import (
    MOST_RECORDS,
    RoundingCost,
    read_rounding_cost,
)
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.stage import TableStage

State = Literal["done", "partial", "pending"]
EMPTY_SHARD_BYTES = 3500  # the schema with its notes, at both ends of the file


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step is, and why it is not done. Unknown counts are None."""

    state: State
    why: str
    shards_done: int = 0
    num_shards: int | None = None
    num_rows: int | None = None
    num_positions: int | None = None
    num_bytes: int | None = None
    estimated: bool = False


def finished_manifest(step: PlannedStep) -> Manifest | None:
    """Return the manifest of a finished table step, else None."""
    manifest = manifest_if_there(step.place)
    if manifest is not None and manifest.fingerprint != step.fingerprint:
        raise StoreError(
            f"{step.place} holds fingerprint {manifest.fingerprint[:16]}, the recipe's step "
            f"'{step.name}' is {step.fingerprint[:16]}: move that folder away and run again"
        )
    return manifest


def is_done(step: PlannedStep) -> bool:
    """Whether a step is complete: one file says so, however many shards it has."""
    if step.writes_table:
        return finished_manifest(step) is not None
    return read_checkpoint(step.place) is not None


def progress_of(step: PlannedStep) -> Progress:
    """Look at a step's folder: is it done, and if not, what is left and what will it come to?"""
    if not step.writes_table:
        done = is_done(step)
        what = "checkpoint" if step.makes_model else "report"
        why = f"its {what} is complete" if done else f"no {what} with this fingerprint"
        return Progress("done" if done else "pending", why)
    manifest = finished_manifest(step)
    if manifest is not None:
        return Progress(
            state="done",
            why="its manifest is complete",
            shards_done=len(manifest.shards),
            num_shards=len(manifest.shards),
            num_rows=manifest.num_rows,
            num_positions=manifest.num_positions,
            num_bytes=manifest.num_bytes + _head_bytes(step),
        )
    return _unfinished(step)


def calibration_of(step: PlannedStep) -> Calibration | None:
    """Return what was found for a step with ``mean_k``, once it was."""
    is_asked = isinstance(step.stage, TeacherLogitsStage) and step.stage.mean_k is not None
    return read_calibration(step.place) if is_asked else None


def rounding_cost_of(step: PlannedStep) -> RoundingCost | None:
    """Return what rounding cost a finished step of ``exact`` with ``mean_kl``."""
    is_asked = isinstance(step.stage, TeacherLogitsStage) and step.stage.table is EXACT_INT8
    manifest = finished_manifest(step) if is_asked else None
    if manifest is None:
        return None
    names = [shard.name for shard in islice(manifest.shards, MOST_RECORDS)]
    return read_rounding_cost(step.place, names)


def _unfinished(step: PlannedStep) -> Progress:
    if isinstance(step.stage, FileMapStage):
        return _unfinished_map(step, step.stage)
    source = finished_manifest(step.inputs[0]) if step.inputs else None
    finished = _count_records(step.place, 0 if source is None else len(source.shards))
    state: State = "partial" if finished else "pending"
    why = _why(finished)
    if source is None:
        waits = f"; waits for '{step.inputs[0].name}'" if step.inputs else ""
        return Progress(state, why + waits, finished)
    assert isinstance(step.stage, TableStage)
    model = next(iter(step.models.values()), None)
    if model is not None and not (model.base / "config.json").is_file():  # yet to be made
        return Progress(state, why, finished, len(source.shards), source.num_rows)
    hidden_size = 0 if model is None else hidden_size_of(model.base)
    estimate = step.stage.estimate(source, hidden_size=hidden_size)
    return Progress(
        state=state,
        why=why,
        shards_done=finished,
        num_shards=len(source.shards),
        num_rows=source.num_rows,
        num_positions=estimate.num_positions,
        num_bytes=estimate.num_bytes + _head_bytes(step) + EMPTY_SHARD_BYTES * len(source.shards),
        estimated=True,
    )


def _head_bytes(step: PlannedStep) -> int:
    """Return the bytes of the heads that lie beside the shards of an ``exact`` table."""
    beside = step.stage.side_files if isinstance(step.stage, TableStage) else ()
    if not any(name.endswith(".safetensors") for name in beside):
        return 0
    return sum(
        vocab_size_of(model.base) * hidden_size_of(model.base) * (4 if "32" in model.dtype else 2)
        for model in step.models.values()
        if (model.base / "config.json").is_file()
    )


def _unfinished_map(step: PlannedStep, stage: FileMapStage) -> Progress:
    pieces = stage.pieces()
    finished = _count_records(step.place, len(pieces))
    estimate = stage.estimate(pieces, vocab_size=int(step.identity["vocab_size"]))
    return Progress(
        state="partial" if finished else "pending",
        why=_why(finished),
        shards_done=finished,
        num_shards=len(pieces),
        num_rows=sum(piece.num_rows for piece in pieces if piece.split == "train"),
        num_positions=estimate.num_positions,
        num_bytes=estimate.num_bytes + EMPTY_SHARD_BYTES * len(pieces),
        estimated=True,
    )


def _why(finished: int) -> str:
    return f"{finished} shards are finished" if finished else "nothing has this fingerprint"


def _count_records(folder: Folder, num_shards: int) -> int:
    """Return how many shards are finished; a store is asked for each by name, never for a list.

    The names follow from their number; of a step without a finished input that is not known yet.
    """
    if isinstance(folder, Path):
        return count_records(folder)
    names = [shard_name(index, num_shards) for index in range(num_shards)]
    return sum(notes is not None for notes in all_notes(folder, names))
