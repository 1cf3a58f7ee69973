"""Carry out a plan: skip what is done, finish what is begun, make the rest, manifest last.

One run at a time may write a step, or several that each write other shards of it: they hold locks
that die with the process, and whoever comes too late is refused in one line.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.dispatch import Limits
from pipeline.fingerprint import fingerprint_of, vocab_size_of
from pipeline.kept_shards import kept_shards
from pipeline.local_executor import run_local
from pipeline.plan import PlannedStep, Progress, finished_manifest, is_done, needs, progress_of
from pipeline.recipe import Execution
from pipeline.shard_task import RowCount, ShardTasks, StepTasks, write_output
from pipeline.step_lock import remove_torn_files, shards_lock, step_lock
from pipeline.training_job import TrainingJob
from pipeline.working_folder import published, remove_work, working_folder
from schemas.episodes import EPISODES
from schemas.errors import ConfigError, StoreError
from schemas.manifest import (
    Manifest,
    ShardRecord,
    damaged_shards,
    listed_shards,
    shard_name,
    write_manifest,
)
from schemas.object_store import Folder, ObjectPath
from schemas.shard_list import (
    SHARD_LIST,
    ShardList,
    ShardListBuilder,
    ShardTotals,
    shard_index,
)
from schemas.shards import sha256_of, write_text
from stages.checkpoint import CheckpointRecord, write_checkpoint
from stages.stage import SourceStage, StageContext, TableStage
from stages.student.config import (
    EvaluateStage,
    PreferenceEvaluationStage,
    StudentInitStage,
    TrainStage,
)
from stages.teacher_align import TeacherAlignStage
from stages.tokenizer_identity import tokenizer_fingerprint

WORK_FOLDER = ".work"
EVALUATION = "evaluation.json"


class Reporter(Protocol):
    """Told what happens, in order; prints it or drives a progress bar."""

    def step_started(self, step: PlannedStep, progress: Progress) -> None:
        """A step begins, or is found done (``progress.state``)."""

    def said(self, line: str) -> None:
        """A line about work that has no shards to count yet."""

    def shards_expected(self, num_shards: int, num_finished: int) -> None:
        """How many shards the step has, and how many an earlier run finished."""

    def shard_finished(self, record: ShardRecord) -> None:
        """One more shard is on disk."""

    def warned(self, line: str) -> None:
        """Something went wrong that the run makes good by itself."""

    def trained(self, values: dict[str, Any]) -> None:
        """The trainer reports a step or an evaluation."""

    def step_finished(self, step: PlannedStep) -> None:
        """The step is complete."""


def run_plan(plan: Sequence[PlannedStep], execution: Execution, reporter: Reporter) -> None:
    """Bring every step to completion, in order."""
    _refuse_undivided_steps(plan, execution)
    for step in plan:
        progress = progress_of(step)
        reporter.step_started(step, progress)
        if progress.state == "done":
            _refuse_missing_files(step)
            _remove_work(step)
            continue
        with step_lock(step.place, warned=reporter.warned):
            remove_torn_files(step.place)
            if not is_done(step):  # another run may have finished it meanwhile
                _run_step(step, execution, reporter)
        reporter.step_finished(step)


def run_shards(
    step: PlannedStep, shards: range, execution: Execution, reporter: Reporter
) -> ShardTotals:
    """Bring some shards of a table step to completion; ``run_plan`` writes its manifest later.

    Other runs may make other shards of the step meanwhile. Raises ConfigError for a step without
    shards of its own, or for shards that it does not have.
    """
    if not isinstance(step.stage, TableStage):
        raise ConfigError(
            f"--shards is about steps that make a table from a table, '{step.name}' is of stage "
            f"{step.stage.stage}: leave it out"
        )
    num_shards = len(_source_of(step).shards)
    if not 0 <= shards.start < shards.stop <= num_shards:
        raise ConfigError(
            f"--shards is {shards.start}:{shards.stop}, step '{step.name}' has shards "
            f"0:{num_shards}: expected a part of that"
        )
    reporter.step_started(step, progress_of(step))
    manifest = finished_manifest(step)
    if manifest is not None:
        _refuse_missing_files(step)
        return ShardList.of(manifest.shards[shards.start : shards.stop]).totals
    with shards_lock(step.place, shards, warned=reporter.warned):
        for index in shards:
            remove_torn_files(step.place, shard_name(index, num_shards))
        _refuse_full_disk(step)
        return _make_shards(step, step.stage, shards, execution, reporter).totals(shards)


def _run_step(step: PlannedStep, execution: Execution, reporter: Reporter) -> None:
    _refuse_full_disk(step)
    match step.stage:
        case SourceStage() as stage:
            _run_source(step, stage, reporter)
        case TableStage() as stage:
            _run_table(step, stage, execution, reporter)
        case TeacherAlignStage() as stage:
            from stages.alignment import align  # loads torch and TRL

            with published(step.place) as folder:
                align(
                    stage,
                    model=step.models[stage.model].folder,
                    pairs=step.inputs[0].place,
                    output=folder,
                    fingerprint=step.fingerprint,
                    identity=step.identity,
                    on_event=reporter.trained,
                )
        case StudentInitStage() as stage:
            from stages.student.init import init_student  # loads torch

            with published(step.place) as folder:
                init_student(step.models[stage.model].folder, folder, stage.layers)
                record = CheckpointRecord(fingerprint=step.fingerprint, identity=step.identity)
                write_checkpoint(folder, record)
        case TrainStage() as stage:
            _run_training(step, stage, execution, reporter)
        case EvaluateStage() as stage:
            _run_evaluation(step, stage, reporter)
        case PreferenceEvaluationStage() as stage:
            _run_preference_evaluation(step, stage, reporter)


def _run_source(step: PlannedStep, stage: SourceStage, reporter: Reporter) -> None:
    work_folder = working_folder(step.place) / WORK_FOLDER
    prepared = stage.prepare(work_folder, on_progress=reporter.said)
    tokenizer = Path(stage.tokenizer)
    vocab_size = vocab_size_of(tokenizer)
    bound = stage.bind(StageContext(folder=step.place, vocab_size=vocab_size))
    num_shards = len(prepared.shards)

    def make(indices: Sequence[int]) -> Iterator[tuple[int, ShardRecord]]:
        for index in indices:
            rows = RowCount(stage.read(work_folder, index))
            name, split = shard_name(index, num_shards), prepared.shards[index].split
            record = write_output(
                step.place, name, bound, rows, split=split, made_by=_made_by(step)
            )
            yield index, record

    shards = _make_missing(step, num_shards, range(num_shards), make, reporter).finish()
    fingerprint = tokenizer_fingerprint(tokenizer)
    _write_manifest(step, shards, fingerprint, vocab_size, dict(prepared.rejects))
    _remove_work(step)


def _remove_work(step: PlannedStep) -> None:
    """Free what a source needed on the way; a run killed just before it left that behind."""
    if isinstance(step.place, Path):
        shutil.rmtree(step.place / WORK_FOLDER, ignore_errors=True)
    else:
        remove_work(step.place)


def _run_table(
    step: PlannedStep, stage: TableStage, execution: Execution, reporter: Reporter
) -> None:
    source = _source_of(step)
    every = range(len(source.shards))
    shards = _make_shards(step, stage, every, execution, reporter).finish()
    vocab_size = vocab_size_of(step.models[stage.model].spec().path)
    _write_manifest(step, shards, source.tokenizer, vocab_size, {})


def _source_of(step: PlannedStep) -> Manifest:
    source = finished_manifest(step.inputs[0])
    assert source is not None, "steps run in order"
    return source


def _make_shards(
    step: PlannedStep,
    stage: TableStage,
    shards: range,
    execution: Execution,
    reporter: Reporter,
) -> ShardListBuilder:
    """Make some shards of a table step as far as they are not finished, and the side files."""
    source = _source_of(step)
    models = {name: model.spec() for name, model in step.models.items()}
    context = StageContext(
        folder=step.place,
        vocab_size=vocab_size_of(models[stage.model].path),
        models=models,
        engine=execution.engine,
        input_table=source.table,
    )
    made_by = _made_by(step)

    def make(indices: Sequence[int]) -> Iterator[tuple[int, ShardRecord]]:
        if not indices and all((step.place / name).is_file() for name in stage.side_files):
            return
        tasks = StepTasks(
            folder=step.place,
            indices=indices,
            input_folder=step.inputs[0].place,
            input_shards=source.shard_list,
            max_rejected_fraction=stage.max_rejected_fraction,
            made_by=made_by,
        )
        for record in _run_shards(stage, context, tasks, execution, reporter):
            yield shard_index(record.name), record

    return _make_missing(step, len(source.shards), shards, make, reporter)


def _make_missing(
    step: PlannedStep,
    num_shards: int,
    shards: range,
    make: Callable[[Sequence[int]], Iterator[tuple[int, ShardRecord]]],
    reporter: Reporter,
) -> ShardListBuilder:
    """Make those ``shards`` of ``num_shards`` that an earlier run did not finish.

    Then those whose bytes have changed; returns the records of all.
    """
    with kept_shards(step.place, num_shards, shards) as kept:
        reporter.shards_expected(len(shards), kept.num_kept)
        for index, record in make(kept.missing()):
            kept.records.add(index, record)
            reporter.shard_finished(record)
        if changed := kept.changed():
            first = shard_name(changed[0], num_shards)
            reporter.warned(
                f"{len(changed)} finished shards no longer have the bytes that were written "
                f"(first: {step.place / first}.arrow): making them again"
            )
            for index, record in make(changed):
                kept.records.add(index, record)
                reporter.shard_finished(record)
        return kept.records


def _run_shards(
    stage: TableStage,
    context: StageContext,
    tasks: ShardTasks,
    execution: Execution,
    reporter: Reporter,
) -> Iterator[ShardRecord]:
    limits = Limits(execution.workers, execution.max_attempts, execution.shard_timeout_s)
    if execution.executor == "local":
        return run_local(stage, context, tasks, limits, warned=reporter.warned)
    from pipeline.ray_executor import run_on_ray  # loads ray

    address = execution.address
    return run_on_ray(stage, context, tasks, limits, address=address, warned=reporter.warned)


def _made_by(step: PlannedStep) -> dict[str, Any]:
    """Return what a shard's record says of its origin; the manifest spells the identity out."""
    models = [
        {"engine": model.engine, "dtype": model.dtype, "identity": fingerprint_of(model.identity)}
        for model in step.models.values()
    ]
    return {"fingerprint": step.fingerprint, "models": models}


def _write_manifest(
    step: PlannedStep,
    shards: ShardList,
    tokenizer: str,
    vocab_size: int,
    source_rejects: dict[str, int],
) -> None:
    assert isinstance(step.stage, SourceStage | TableStage)
    table = step.stage.table
    side_files = step.stage.side_files if isinstance(step.stage, TableStage) else ()
    manifest = Manifest(
        table=table.name,
        version=table.version,
        variant=table.variant,
        fingerprint=step.fingerprint,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        identity=step.identity,
        shards=shards,
        source_rejects=source_rejects,
        files={name: _written_sha256(step.place / name) for name in side_files},
    )
    write_manifest(step.place, manifest)


def _written_sha256(path: Folder) -> str:
    """Return the checksum of what this run has just written: of an object, the one beside it."""
    info = path.info() if isinstance(path, ObjectPath) else None
    return info.sha256 if info is not None and info.sha256 else sha256_of(path)


def _run_training(
    step: PlannedStep, stage: TrainStage, execution: Execution, reporter: Reporter
) -> None:
    student = step.models[stage.student]
    job = TrainingJob(
        config=stage,
        student=student.base if student.adapter is None else student.folder,
        data=tuple(source.place for source in step.inputs[: len(stage.data)]),
        lm_data=tuple(source.place for source in step.inputs[len(stage.data) :]),
        output=step.place,
        fingerprint=step.fingerprint,
    )
    if execution.executor == "ray":
        import pipeline.ray_executor  # noqa: F401  says in one line when Ray is not installed
        from pipeline.ray_training import train_on_ray

        address = execution.address
        train_on_ray(job, execution.training_processes, reporter.trained, address=address)
    elif execution.training_processes == 1:
        job.carry_out(reporter.trained)
    else:
        from pipeline.training_launch import train_in_processes  # loads torch

        train_in_processes(job, execution.training_processes, reporter.trained)
    remove_work(step.place)


def _run_evaluation(step: PlannedStep, stage: EvaluateStage, reporter: Reporter) -> None:
    """Measure each student; ``evaluation.json`` has every number of every task."""
    from stages.student.evaluation import evaluate
    from stages.student.icl_evaluation import evaluate_episodes  # both load torch

    data = [source.place for source in step.inputs]
    first = step.inputs[0].stage
    assert isinstance(first, SourceStage | TableStage)
    reports: dict[str, Any] = {}
    metrics: dict[str, dict[str, float]] = {}
    for name, model in step.models.items():
        reporter.said(f"measuring {name}")
        if first.table is EPISODES:
            report = evaluate_episodes(model.folder, data, scoring=stage.score)
            reports[name], metrics[name] = report.as_dict(), report.summary()
        else:
            reports[name] = metrics[name] = evaluate(model.folder, data)
    _write_evaluation(step, reports, metrics)


def _run_preference_evaluation(
    step: PlannedStep, stage: PreferenceEvaluationStage, reporter: Reporter
) -> None:
    """Measure the students side by side; ``evaluation.json`` has win rates and examples too."""
    from stages.student.preference_evaluation import (  # loads torch
        Judge,
        PreferenceOptions,
        evaluate_preferences,
    )

    folders = {name: model.folder for name, model in step.models.items()}
    judge = None
    if stage.judge is not None:
        teacher, reference = folders[stage.judge.teacher], folders[stage.judge.reference]
        judge = Judge(teacher, reference, stage.judge.beta)
    report = evaluate_preferences(
        {name: folders[name] for name in stage.measured},
        [source.place for source in step.inputs],
        baseline=stage.baseline,
        judge=judge,
        options=PreferenceOptions(stage.max_tokens, stage.batch_size, stage.seed),
        on_progress=reporter.said,
    )
    _write_evaluation(step, report.as_dict(), report.students)


def _write_evaluation(
    step: PlannedStep, body: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]
) -> None:
    record = CheckpointRecord(fingerprint=step.fingerprint, identity=step.identity, metrics=metrics)
    with published(step.place) as folder:
        write_text(folder / EVALUATION, json.dumps(body, indent=1) + "\n")
        write_checkpoint(folder, record)


def step_named(plan: Sequence[PlannedStep], name: str) -> PlannedStep:
    """Return step ``name``; what it reads must be finished."""
    chosen = next((step for step in plan if step.name == name), None)
    if chosen is None:
        raise ConfigError(
            f"'{name}' is no step; there are: {', '.join(step.name for step in plan)}"
        )
    for needed in needs(plan, chosen):
        if progress_of(needed).state != "done":
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
    students = {model.base for model in chosen.models.values()}
    makers = [step for step in plan if step.place in students]
    for source in (*chosen.inputs, *(m for m in makers if isinstance(m.stage, TrainStage))):
        if not is_done(source):
            raise StoreError(
                f"step '{source.name}', which '{name}' trains from, is not finished: "
                f"run `teachercache run` first"
            )
    return [*makers, chosen]


def _refuse_undivided_steps(plan: Sequence[PlannedStep], execution: Execution) -> None:
    """Find out before a teacher has worked for it that a student cannot be trained so."""
    for step in plan:
        if isinstance(step.stage, TrainStage) and not is_done(step):
            try:
                step.stage.share(execution.training_processes)
            except ConfigError as error:
                raise ConfigError(f"steps.{step.name}: {error}") from error


def _refuse_full_disk(step: PlannedStep) -> None:
    if isinstance(step.place, ObjectPath):  # a store has no end
        return
    progress = progress_of(step)
    if progress.num_bytes is None or not progress.num_shards:
        return
    needed = progress.num_bytes * (1 - progress.shards_done / progress.num_shards)
    free = shutil.disk_usage(step.place).free
    if needed > free:
        raise StoreError(
            f"step '{step.name}' needs about {needed / 1e6:,.1f} MB in {step.place}, only "
            f"{free / 1e6:,.1f} MB are free: free some or move execution.root"
        )


def _refuse_missing_files(step: PlannedStep) -> None:
    """A finished step whose files have gone must not be taken for finished.

    On a store that would be a request a shard; who needs one that has gone is told there.
    """
    manifest = finished_manifest(step)
    if manifest is None or isinstance(step.place, ObjectPath):
        return
    num_shards = len(manifest.shards)
    gone = np.flatnonzero(~listed_shards(step.place, num_shards, ".arrow"))
    others = (SHARD_LIST, *manifest.files)
    missing = [f"{shard_name(index, num_shards)}.arrow" for index in gone.tolist()]
    missing += [name for name in others if not (step.place / name).is_file()]
    if missing:
        raise StoreError(
            f"{step.place} has a manifest but {len(missing)} of its files are gone (first: "
            f"{missing[0]}): delete its manifest.json and run again to make them anew"
        )


def verify_step(step: PlannedStep) -> list[str]:
    """Return one line for each thing wrong with a finished table step."""
    manifest = finished_manifest(step)
    return [] if manifest is None else damaged_shards(step.place, manifest)
