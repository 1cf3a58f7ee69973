"""Carry out a plan: skip what is done, finish what is begun, make the rest, manifest last.

One run at a time may write a step, or several that each write other shards of it: they hold locks
that die with the process, and whoever comes too late is refused in one line.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.planning.plan import PlannedStep, needs
from pipeline.planning.recipe import Execution
from pipeline.state.finished_files import finished_files
from pipeline.state.step_lock import remove_torn_files, shards_lock, step_lock
from pipeline.state.step_state import Progress, finished_manifest, is_done, progress_of
from pipeline.steps.extension import extend_table, remove_extension
from pipeline.steps.fit import require_fit
from pipeline.steps.folder_step import run_folder
from pipeline.steps.reporter import Reporter
from pipeline.steps.table_step import (
    make_shards,
    num_shards_of,
    remove_source_work,
    run_source,
    run_table,
    source_of,
)
from pipeline.steps.training_step import run_training
from schemas.errors import ConfigError, EngineError, StoreError
from schemas.storage.files import Folder
from schemas.storage.object_path import ObjectPath
from schemas.storage.records import shard_name
from schemas.storage.shard_list import ShardList, ShardTotals
from stages.file_map import FileMapStage
from stages.stage import FolderStage, SignalStage, SourceStage, TableStage
from stages.student.options import TENSORBOARD_FOLDER, TrainOptions
from stages.student.packages import require_packages
from stages.student.train.stage import TrainStage


def run_plan(
    plan: Sequence[PlannedStep],
    execution: Execution,
    reporter: Reporter,
    *,
    extends: Sequence[Folder] = (),
    fit_check: bool = True,
) -> None:
    """Bring every step to completion, in order.

    Rows of finished tables below the roots ``extends`` are copied where signals are made of more
    rows, or of fewer, than those were. With ``fit_check`` what is known not to fit on the disk or
    into the memory is refused: all of it before the first step, and each step once what it reads is
    finished.
    """
    _refuse_untrainable_steps(plan, execution)
    if fit_check:
        require_fit(plan, execution)
    for step in plan:
        progress = progress_of(step)
        reporter.step_started(step, progress)
        if progress.state == "done":
            _refuse_missing_files(step)
            remove_source_work(step)
            if isinstance(step.place, Path):  # in a store a look costs a request for each step
                remove_extension(step)
            continue
        with step_lock(step.place, warned=reporter.warned):
            remove_torn_files(step.place)
            if not is_done(step):  # another run may have finished it meanwhile
                if fit_check:
                    require_fit([step], execution)
                _run_step(step, execution, reporter, extends)
            remove_extension(step)
        reporter.step_finished(step)


def run_shards(
    step: PlannedStep,
    shards: range,
    execution: Execution,
    reporter: Reporter,
    *,
    fit_check: bool = True,
) -> ShardTotals:
    """Bring some shards of a table step to completion; ``run_plan`` writes its manifest later.

    Other runs may make other shards of the step meanwhile. Raises ConfigError for a step without
    shards of its own, or for shards that it does not have.
    """
    if not isinstance(step.stage, TableStage | FileMapStage):
        raise ConfigError(
            f"--shards is about steps whose shards are made one by one, '{step.name}' is of stage "
            f"{step.stage.stage}: leave it out"
        )
    source = source_of(step)
    num_shards = num_shards_of(source)
    if not 0 <= shards.start < shards.stop <= num_shards:
        raise ConfigError(
            f"--shards is {shards.start}:{shards.stop}, step '{step.name}' has shards "
            f"0:{num_shards}: expected a part of that"
        )
    manifest = finished_manifest(step)
    if manifest is not None:
        reporter.step_started(step, progress_of(step))
        _refuse_missing_files(step)
        return ShardList.of(manifest.shards[shards.start : shards.stop]).totals
    # How much of the whole step there is would be a question a shard to a store, in each group.
    why = f"shards {shards.start}:{shards.stop} of {num_shards}"
    reporter.step_started(step, Progress("partial", why, num_shards=num_shards))
    with shards_lock(step.place, shards, warned=reporter.warned):
        remove_torn_files(step.place, {shard_name(index, num_shards) for index in shards})
        if fit_check:
            require_fit([step], execution)
        made = make_shards(step, step.stage, source, shards, execution, reporter)
        return made.totals(shards)


def _run_step(
    step: PlannedStep, execution: Execution, reporter: Reporter, extends: Sequence[Folder]
) -> None:
    if isinstance(step.stage, SignalStage):
        extend_table(step, step.stage, extends, execution, reporter)
    match step.stage:
        case TableStage() | FileMapStage() as stage:
            run_table(step, stage, execution, reporter)
        case SourceStage() as stage:
            run_source(step, stage, reporter)
        case TrainStage() as stage:
            run_training(step, stage, execution, reporter)
        case FolderStage() as stage:
            run_folder(step, stage, reporter)
    if not is_done(step):  # whatever made it come back early, it is not to be taken for done
        raise EngineError(
            f"step '{step.name}' ended before its work was done ({step.place}): run again to go on"
        )


def step_named(plan: Sequence[PlannedStep], name: str) -> PlannedStep:
    """Return step ``name``; what it reads must be finished."""
    chosen = next((step for step in plan if step.name == name), None)
    if chosen is None:
        raise ConfigError(
            f"'{name}' is no step; there are: {', '.join(step.name for step in plan)}"
        )
    for needed in needs(plan, chosen):
        if not is_done(needed):
            raise StoreError(
                f"step '{needed.name}', which '{name}' reads, is not finished: run it first, or "
                f"the whole recipe"
            )
    return chosen


def training_step(plan: Sequence[PlannedStep], name: str) -> list[PlannedStep]:
    """Return step ``name`` and the student it starts from; its tables must be finished."""
    chosen = next((step for step in plan if step.name == name), None)
    if chosen is None or not isinstance(chosen.stage, TrainStage):
        names = [step.name for step in plan if isinstance(step.stage, TrainStage)]
        raise ConfigError(
            f"'{name}' is not a training step; there are: {', '.join(names) or 'none'}"
        )
    used = {place for model in chosen.models.values() for place in (model.base, model.adapter)}
    makers = [step for step in plan if step.place in used]
    for source in (*chosen.inputs, *(m for m in makers if isinstance(m.stage, TrainStage))):
        if not is_done(source):
            raise StoreError(
                f"step '{source.name}', which '{name}' trains from, is not finished: "
                f"run `teachercache run` first"
            )
    return [*makers, chosen]


def _refuse_untrainable_steps(plan: Sequence[PlannedStep], execution: Execution) -> None:
    """Find out before a teacher has worked for it that a student cannot be trained so."""
    for step in plan:
        if isinstance(step.stage, TrainStage) and not is_done(step):
            try:
                step.stage.share(execution.training_processes)
                if execution.training_sharding != "none":
                    step.stage.require_shards(execution.training_processes)
                _refuse_trackers_without_place(step, execution)
                if execution.executor == "local":  # else the cluster's workers know
                    trackers = TrainOptions(report_to=execution.report_to).packages()
                    require_packages([*step.stage.packages(), *trackers])
            except ConfigError as error:
                raise ConfigError(f"steps.{step.name}: {error}") from error


def _refuse_trackers_without_place(step: PlannedStep, execution: Execution) -> None:
    if "tensorboard" not in execution.report_to or os.environ.get(TENSORBOARD_FOLDER):
        return
    if isinstance(step.place, ObjectPath):
        raise ConfigError(
            f"report_to: tensorboard writes into a step's folder, and {step.place} is in a store: "
            f"set {TENSORBOARD_FOLDER} to a folder of this machine"
        )


def _refuse_missing_files(step: PlannedStep) -> None:
    """A finished step whose files have gone must not be taken for finished.

    On a store that would be a request a shard; who needs one that has gone is told there.
    """
    if isinstance(step.place, ObjectPath) or not step.writes_table:
        return
    files = finished_files(step)
    missing = () if files is None else files.missing
    if missing:
        raise StoreError(
            f"{step.place} has a manifest but {len(missing)} of its files are gone (first: "
            f"{missing[0]}): `teachercache repair` makes them anew, or "
            f"delete its manifest.json and run again"
        )
