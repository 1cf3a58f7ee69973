"""Make a table: the shards that an earlier run did not finish, then its manifest, last."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.executors.dispatch import Limits
from pipeline.executors.local.shards import run_local
from pipeline.executors.shard_task import (
    PieceTasks,
    RowCount,
    ShardTasks,
    StepTasks,
    write_output,
)
from pipeline.planning.fingerprint import fingerprint_of, vocab_size_of
from pipeline.planning.plan import PlannedStep
from pipeline.planning.recipe import Execution
from pipeline.state.kept_shards import kept_shards
from pipeline.state.step_state import finished_manifest
from pipeline.state.working_folder import remove_work, working_folder
from pipeline.steps.repeated_rows import without_repeated
from pipeline.steps.reporter import Reporter, engines_starting
from schemas.errors import ConfigError, RejectLimitError, StoreError
from schemas.storage.files import Folder, sha256_of, write_text
from schemas.storage.manifest import Manifest, write_manifest
from schemas.storage.object_path import ObjectPath
from schemas.storage.records import ShardRecord, shard_index, shard_name
from schemas.storage.schema_file import write_schema_file
from schemas.storage.shard_list import ShardList, ShardListBuilder
from schemas.table import BoundTable
from stages.file_map import FileMapStage, Piece
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.signals.teacher_logits.calibration import CALIBRATION, require_one_tau
from stages.stage import Prepared, SignalStage, SourceStage, StageContext, TableStage

WORK_FOLDER = ".work"
SOURCE_REJECTS = "source.rejects.jsonl"  # the first records of each reason that a source rejected
MappedStage = TableStage | FileMapStage
Make = Callable[[Sequence[int]], Iterator[tuple[int, ShardRecord]]]  # the shards of these indices


def run_source(step: PlannedStep, stage: SourceStage, reporter: Reporter) -> None:
    """Prepare the source, write its shards one after another, then the manifest."""
    work_folder = working_folder(step.place) / WORK_FOLDER
    prepared = stage.prepare(work_folder, on_progress=reporter.said)
    num_shards = len(prepared.shards)
    bound = bound_source(step, stage)
    make = _source_maker(step, stage, prepared, work_folder)
    shards = make_missing(step.place, num_shards, range(num_shards), make, reporter).finish()
    if prepared.rejected:
        lines = [json.dumps(dict(row), sort_keys=True) + "\n" for row in prepared.rejected]
        write_text(step.place / SOURCE_REJECTS, "".join(lines))
    fingerprint = tokenizer_fingerprint(Path(stage.tokenizer))
    write_table_manifest(step, bound, shards, fingerprint, dict(prepared.rejects))
    remove_source_work(step)


def bound_source(step: PlannedStep, stage: SourceStage) -> BoundTable[Any]:
    """Return the table of a source with its vocabulary known."""
    vocab_size = vocab_size_of(Path(stage.tokenizer))
    return stage.bind(StageContext(folder=step.place, vocab_size=vocab_size))


def _source_maker(
    step: PlannedStep, stage: SourceStage, prepared: Prepared, work_folder: Path
) -> Make:
    bound, num_shards = bound_source(step, stage), len(prepared.shards)

    def make(indices: Sequence[int]) -> Iterator[tuple[int, ShardRecord]]:
        for index in indices:
            rows = RowCount(stage.read(work_folder, index))
            name, split = shard_name(index, num_shards), prepared.shards[index].split
            record = write_output(step.place, name, bound, rows, split=split, made_by=made_by(step))
            yield index, record

    return make


def remove_source_work(step: PlannedStep) -> None:
    """Free what a source needed on the way; a run killed just before it left that behind."""
    if isinstance(step.place, Path):
        shutil.rmtree(step.place / WORK_FOLDER, ignore_errors=True)
    else:
        remove_work(step.place)


def run_table(
    step: PlannedStep, stage: MappedStage, execution: Execution, reporter: Reporter
) -> None:
    """Make the shards on the executor that the recipe asks for, then the manifest."""
    source = source_of(step)
    every = range(num_shards_of(source))
    shards = make_shards(step, stage, source, every, execution, reporter).finish()
    bound = stage.bind(context_of(step, stage, source, execution))
    if stage.TOKENIZER:
        tokenizer = tokenizer_fingerprint(Path(getattr(stage, stage.TOKENIZER)))
    else:
        assert isinstance(source, Manifest)
        tokenizer = source.tokenizer
    if isinstance(stage, FileMapStage):
        shards = without_repeated(
            step.place, bound, shards, made_by=made_by(step), said=reporter.said
        )
    _require_rows(step, shards)
    if CALIBRATION in _side_files(stage):
        require_one_tau(step.place, [shard.name for shard in shards])
    write_table_manifest(step, bound, shards, tokenizer, {})


def _require_rows(step: PlannedStep, shards: ShardList) -> None:
    """Refuse a table of which nothing is left: whatever reads it would blame something else."""
    totals = shards.totals
    if totals.num_shards and not totals.num_rows and totals.rejects:
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(totals.rejects.items()))
        raise RejectLimitError(
            f"{step.place}: no row is left, all were rejected ({reasons}): "
            f"shard-*.rejects.jsonl there names them; change the step's settings or its input"
        )


def source_of(step: PlannedStep) -> Manifest | Sequence[Piece]:
    """Return the table that a table step reads, which must be finished, or pieces of its files."""
    if isinstance(step.stage, FileMapStage):
        return step.stage.pieces()
    source = finished_manifest(step.inputs[0])
    assert source is not None, "steps run in order"
    return source


def num_shards_of(source: Manifest | Sequence[Piece]) -> int:
    """Return how many shards are made of it."""
    return len(source.shards if isinstance(source, Manifest) else source)


def make_shards(
    step: PlannedStep,
    stage: MappedStage,
    source: Manifest | Sequence[Piece],
    shards: range,
    execution: Execution,
    reporter: Reporter,
) -> ShardListBuilder:
    """Make some shards of a table step as far as they are not finished, and the side files.

    ``source`` is what ``source_of`` returned.
    """
    make = _table_maker(step, stage, source, execution, reporter)
    return make_missing(step.place, num_shards_of(source), shards, make, reporter)


def make_again(
    step: PlannedStep,
    indices: Sequence[int],
    num_shards: int,
    execution: Execution,
    reporter: Reporter,
) -> dict[int, ShardRecord]:
    """Make some of the shards of a finished table, over what lies there; the side files if none.

    A source reads all of its files again. Of files cut in pieces, rows that an earlier shard has
    are not left out yet: ``without_repeated`` does that. Raises StoreError, before anything is
    written, where the step would come to another number of shards now.
    """
    match step.stage:
        case TableStage() | FileMapStage() as stage:
            source = source_of(step)
            make = _table_maker(step, stage, source, execution, reporter)
            found = num_shards_of(source)
        case SourceStage() as stage:
            work_folder = working_folder(step.place) / WORK_FOLDER
            prepared = stage.prepare(work_folder, on_progress=reporter.said)
            make = _source_maker(step, stage, prepared, work_folder)
            found = len(prepared.shards)
        case _:
            raise ConfigError(f"step '{step.name}' makes no shards: repair it where it was made")
    if found != num_shards:
        raise StoreError(
            f"{step.place} has {num_shards} shards, the step comes to {found} now: what reads its "
            f"files has changed; move that folder away and run the recipe for a table of today"
        )
    made = {}
    for index, record in make(indices):
        made[index] = record
        reporter.shard_finished(record)
    if step.kind == "source":
        remove_source_work(step)
    return made


def _table_maker(
    step: PlannedStep,
    stage: MappedStage,
    source: Manifest | Sequence[Piece],
    execution: Execution,
    reporter: Reporter,
) -> Make:
    context = context_of(step, stage, source, execution)
    notes = made_by(step)

    def make(indices: Sequence[int]) -> Iterator[tuple[int, ShardRecord]]:
        if not indices:
            if isinstance(stage, TableStage):
                stage.write_side_files(context)
            return
        tasks: ShardTasks
        if isinstance(source, Manifest):
            tasks = StepTasks(
                folder=step.place,
                indices=indices,
                input_folder=step.inputs[0].place,
                input_shards=source.shard_list,
                max_rejected_fraction=stage.max_rejected_fraction,
                made_by=notes,
            )
        else:
            tasks = PieceTasks(step.place, indices, source, notes)
        engines_starting(stage, context, execution, reporter)
        for record in on_executor(stage, context, tasks, execution, reporter):
            yield shard_index(record.name), record

    return make


def context_of(
    step: PlannedStep,
    stage: MappedStage,
    source: Manifest | Sequence[Piece],
    execution: Execution,
) -> StageContext:
    """Return a worker's context: ids are those of the model, else of the input or tokenizer."""
    models = {name: model.spec() for name, model in step.models.items()}
    if isinstance(stage, SignalStage):
        vocab_size = vocab_size_of(models[stage.model].path)
    elif stage.TOKENIZER:
        vocab_size = vocab_size_of(Path(getattr(stage, stage.TOKENIZER)))
    else:
        assert isinstance(source, Manifest)
        vocab_size = source.vocab_size
    return StageContext(
        folder=step.place,
        vocab_size=vocab_size,
        models=models,
        engine=execution.engine,
        input_table=source.table if isinstance(source, Manifest) else "",
        input_folder=step.inputs[0].place if step.inputs else None,
        other_folders=tuple(source.place for source in step.inputs[1:]),
    )


def make_missing(
    folder: Folder,
    num_shards: int,
    shards: range,
    make: Make,
    reporter: Reporter,
) -> ShardListBuilder:
    """Make those ``shards`` of ``num_shards`` that an earlier run did not finish.

    Then those whose bytes have changed; returns the records of all.
    """
    with kept_shards(folder, num_shards, shards) as kept:
        reporter.shards_expected(len(shards), kept.num_kept)
        for index, record in make(kept.missing()):
            kept.records.add(index, record)
            reporter.shard_finished(record)
        if changed := kept.changed():
            first = shard_name(changed[0], num_shards)
            reporter.warned(
                f"{len(changed)} finished shards no longer have the bytes that were written "
                f"(first: {folder / first}.arrow): making them again"
            )
            for index, record in make(changed):
                kept.records.add(index, record)
                reporter.shard_finished(record)
        return kept.records


def on_executor(
    stage: MappedStage,
    context: StageContext,
    tasks: ShardTasks,
    execution: Execution,
    reporter: Reporter,
) -> Iterator[ShardRecord]:
    """Do some shards where the recipe says; yield the record of each as it is finished."""
    limits = Limits(execution.workers, execution.max_attempts, execution.shard_timeout_s)
    if execution.executor == "local":
        return run_local(stage, context, tasks, limits, warned=reporter.warned)
    from pipeline.executors.ray_cluster.shards import run_on_ray  # loads ray

    address = execution.address
    return run_on_ray(stage, context, tasks, limits, address=address, warned=reporter.warned)


def made_by(step: PlannedStep) -> dict[str, Any]:
    """Return what a shard's record says of its origin; the manifest spells the identity out."""
    models = [
        {"engine": model.engine, "dtype": model.dtype, "identity": fingerprint_of(model.identity)}
        for model in step.models.values()
    ]
    names = {"recipe": step.recipe, "step": step.name}
    return {"fingerprint": step.fingerprint, "models": models, **names}


def write_table_manifest(
    step: PlannedStep,
    bound: BoundTable[Any],
    shards: ShardList,
    tokenizer: str,
    source_rejects: dict[str, int],
) -> None:
    """Write what a reader of the bare shards needs, then the manifest."""
    assert isinstance(step.stage, SourceStage | TableStage)
    table = step.stage.table
    side_files = _side_files(step.stage)
    stage = step.stage
    measures = stage.measures(step.place, shards) if isinstance(stage, TableStage) else {}
    manifest = Manifest(
        table=table.name,
        version=table.version,
        variant=table.variant,
        fingerprint=step.fingerprint,
        tokenizer=tokenizer,
        vocabulary=step.vocabulary,
        vocab_size=bound.vocab_size,
        identity=step.identity,
        shards=shards,
        source_rejects=source_rejects,
        files={name: _written_sha256(step.place / name) for name in side_files},
        measures=measures,
    )
    settings = step.identity["config"]
    write_schema_file(step.place, bound, tokenizer=tokenizer, settings=settings)
    write_manifest(step.place, manifest)


def _side_files(stage: SourceStage | TableStage) -> tuple[str, ...]:
    return stage.side_files if isinstance(stage, TableStage) else ()


def _written_sha256(path: Folder) -> str:
    """Return the checksum of what this run has just written: of an object, the one beside it."""
    info = path.info() if isinstance(path, ObjectPath) else None
    return info.sha256 if info is not None and info.sha256 else sha256_of(path)
