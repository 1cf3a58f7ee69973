"""Carry out a plan: skip what is done, finish what is begun, make the rest, manifest last.

One run at a time may write a step, or several that each write other shards of it: they hold locks
that die with the process, and whoever comes too late is refused in one line.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.dispatch import Limits
from pipeline.fingerprint import fingerprint_of, vocab_size_of
from pipeline.local_executor import run_local
from pipeline.plan import PlannedStep, Progress, finished_manifest, needs, progress_of
from pipeline.recipe import Execution
from pipeline.shard_task import RowCount, ShardTask, write_output
from pipeline.step_lock import remove_torn_files, shards_lock, step_lock
from pipeline.training_job import TrainingJob
from schemas.episodes import EPISODES
from schemas.errors import ConfigError, StoreError
from schemas.manifest import (
    Manifest,
    ShardRecord,
    damaged_shards,
    read_record,
    shard_name,
    write_manifest,
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

    def shards_expected(self, num_shards: int, records: Sequence[ShardRecord]) -> None:
        """How many shards the step has, and those already finished."""

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
        with step_lock(step.folder):
            remove_torn_files(step.folder)
            if progress_of(step).state != "done":  # another run may have finished it meanwhile
                _run_step(step, execution, reporter)
        reporter.step_finished(step)


def run_shards(
    step: PlannedStep, shards: range, execution: Execution, reporter: Reporter
) -> list[ShardRecord]:
    """Bring some shards of a table step to completion; ``run_plan`` writes its manifest later.

    Other runs may make other shards of the step meanwhile. Raises ConfigError for a step without
    shards of its own, or for shards that it does not have.
    """
    if not isinstance(step.stage, TableStage):
        raise ConfigError(
            f"--shards is about steps that make a table from a table, '{step.name}' is of stage "
            f"{step.stage.stage}: leave it out"
        )
    tasks, context = _shard_tasks(step, step.stage, execution)
    if not 0 <= shards.start < shards.stop <= len(tasks):
        raise ConfigError(
            f"--shards is {shards.start}:{shards.stop}, step '{step.name}' has shards "
            f"0:{len(tasks)}: expected a part of that"
        )
    progress = progress_of(step)
    reporter.step_started(step, progress)
    chosen = tasks[shards.start : shards.stop]
    if progress.state == "done":
        _refuse_missing_files(step)
        manifest = finished_manifest(step)
        return [] if manifest is None else list(manifest.shards[shards.start : shards.stop])
    with shards_lock(step.folder, shards):
        for task in chosen:
            remove_torn_files(step.folder, task.name)
        _refuse_full_disk(step)
        return _make_shards(step.stage, context, chosen, execution, reporter)


def _run_step(step: PlannedStep, execution: Execution, reporter: Reporter) -> None:
    _refuse_full_disk(step)
    match step.stage:
        case SourceStage() as stage:
            _run_source(step, stage, reporter)
        case TableStage() as stage:
            _run_table(step, stage, execution, reporter)
        case TeacherAlignStage() as stage:
            from stages.alignment import align  # loads torch and TRL

            align(
                stage,
                model=step.models[stage.model].folder,
                pairs=step.inputs[0].folder,
                output=step.folder,
                fingerprint=step.fingerprint,
                identity=step.identity,
                on_event=reporter.trained,
            )
        case StudentInitStage() as stage:
            from stages.student.init import init_student  # loads torch

            init_student(step.models[stage.model].folder, step.folder, stage.layers)
            record = CheckpointRecord(fingerprint=step.fingerprint, identity=step.identity)
            write_checkpoint(step.folder, record)
        case TrainStage() as stage:
            _run_training(step, stage, execution, reporter)
        case EvaluateStage() as stage:
            _run_evaluation(step, stage, reporter)
        case PreferenceEvaluationStage() as stage:
            _run_preference_evaluation(step, stage, reporter)


def _run_source(step: PlannedStep, stage: SourceStage, reporter: Reporter) -> None:
    work_folder = step.folder / WORK_FOLDER
    prepared = stage.prepare(work_folder, on_progress=reporter.said)
    tokenizer = Path(stage.tokenizer)
    vocab_size = vocab_size_of(tokenizer)
    bound = stage.bind(StageContext(folder=step.folder, vocab_size=vocab_size))
    tasks = list(enumerate(prepared.shards))
    finished = _finished(step.folder, len(tasks))
    reporter.shards_expected(len(tasks), list(finished.values()))
    records = []
    for index, shard in tasks:
        record = finished.get(index)
        if record is None:
            rows = RowCount(stage.read(work_folder, index))
            name = shard_name(index, len(tasks))
            record = write_output(
                step.folder, name, bound, rows, split=shard.split, made_by=_made_by(step)
            )
            reporter.shard_finished(record)
        records.append(record)
    fingerprint = tokenizer_fingerprint(tokenizer)
    _write_manifest(step, records, fingerprint, vocab_size, dict(prepared.rejects))
    _remove_work(step)


def _remove_work(step: PlannedStep) -> None:
    """Free what a source needed on the way; a run killed just before it left that behind."""
    shutil.rmtree(step.folder / WORK_FOLDER, ignore_errors=True)


def _run_table(
    step: PlannedStep, stage: TableStage, execution: Execution, reporter: Reporter
) -> None:
    tasks, context = _shard_tasks(step, stage, execution)
    records = _make_shards(stage, context, tasks, execution, reporter)
    source = finished_manifest(step.inputs[0])
    assert source is not None, "steps run in order"
    _write_manifest(step, records, source.tokenizer, context.vocab_size, {})


def _shard_tasks(
    step: PlannedStep, stage: TableStage, execution: Execution
) -> tuple[list[ShardTask], StageContext]:
    """Return what there is to do, done or not, and what a worker is given for it."""
    source_step = step.inputs[0]
    source = finished_manifest(source_step)
    assert source is not None, "steps run in order"
    models = {name: model.spec() for name, model in step.models.items()}
    context = StageContext(
        folder=step.folder,
        vocab_size=vocab_size_of(models[stage.model].path),
        models=models,
        engine=execution.engine,
        input_table=source.table,
    )
    tasks = [
        ShardTask(
            folder=step.folder,
            index=index,
            num_shards=len(source.shards),
            split=shard.split,
            input_file=source_step.folder / shard.file,
            input_sha256=shard.sha256,
            num_rows=shard.num_rows,
            max_rejected_fraction=stage.max_rejected_fraction,
            made_by=_made_by(step),
        )
        for index, shard in enumerate(source.shards)
    ]
    return tasks, context


def _make_shards(
    stage: TableStage,
    context: StageContext,
    tasks: Sequence[ShardTask],
    execution: Execution,
    reporter: Reporter,
) -> list[ShardRecord]:
    """Make those shards that are not finished, and the side files; return all records in order."""
    records = {task.name: record for task in tasks if (record := task.finished()) is not None}
    reporter.shards_expected(len(tasks), list(records.values()))
    todo = [task for task in tasks if task.name not in records]
    if todo or not all((context.folder / name).is_file() for name in stage.side_files):
        for record in _run_shards(stage, context, todo, execution, reporter):
            records[record.name] = record
            reporter.shard_finished(record)
    return [records[task.name] for task in tasks]


def _run_shards(
    stage: TableStage,
    context: StageContext,
    tasks: Sequence[ShardTask],
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


def _finished(folder: Path, num_shards: int) -> dict[int, ShardRecord]:
    found = {
        index: read_record(folder, shard_name(index, num_shards)) for index in range(num_shards)
    }
    return {index: record for index, record in found.items() if record is not None}


def _write_manifest(
    step: PlannedStep,
    records: Sequence[ShardRecord],
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
        shards=tuple(records),
        source_rejects=source_rejects,
        files={name: sha256_of(step.folder / name) for name in side_files},
    )
    write_manifest(step.folder, manifest)


def _run_training(
    step: PlannedStep, stage: TrainStage, execution: Execution, reporter: Reporter
) -> None:
    job = TrainingJob(
        config=stage,
        student=step.models[stage.student].folder,
        data=tuple(source.folder for source in step.inputs[: len(stage.data)]),
        lm_data=tuple(source.folder for source in step.inputs[len(stage.data) :]),
        output=step.folder,
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


def _run_evaluation(step: PlannedStep, stage: EvaluateStage, reporter: Reporter) -> None:
    """Measure each student; ``evaluation.json`` has every number of every task."""
    from stages.student.evaluation import evaluate
    from stages.student.icl_evaluation import evaluate_episodes  # both load torch

    data = [source.folder for source in step.inputs]
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
        [source.folder for source in step.inputs],
        baseline=stage.baseline,
        judge=judge,
        options=PreferenceOptions(stage.max_tokens, stage.batch_size, stage.seed),
        on_progress=reporter.said,
    )
    _write_evaluation(step, report.as_dict(), report.students)


def _write_evaluation(
    step: PlannedStep, body: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]
) -> None:
    write_text(step.folder / EVALUATION, json.dumps(body, indent=1) + "\n")
    record = CheckpointRecord(fingerprint=step.fingerprint, identity=step.identity, metrics=metrics)
    write_checkpoint(step.folder, record)


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
    makers = [step for step in plan if step.folder in students]
    for source in (*chosen.inputs, *(m for m in makers if isinstance(m.stage, TrainStage))):
        if progress_of(source).state != "done":
            raise StoreError(
                f"step '{source.name}', which '{name}' trains from, is not finished: "
                f"run `teachercache run` first"
            )
    return [*makers, chosen]


def _refuse_undivided_steps(plan: Sequence[PlannedStep], execution: Execution) -> None:
    """Find out before a teacher has worked for it that a student cannot be trained so."""
    for step in plan:
        if isinstance(step.stage, TrainStage) and progress_of(step).state != "done":
            try:
                step.stage.share(execution.training_processes)
            except ConfigError as error:
                raise ConfigError(f"steps.{step.name}: {error}") from error


def _refuse_full_disk(step: PlannedStep) -> None:
    progress = progress_of(step)
    if progress.num_bytes is None or not progress.num_shards:
        return
    needed = progress.num_bytes * (1 - progress.shards_done / progress.num_shards)
    free = shutil.disk_usage(step.folder).free
    if needed > free:
        raise StoreError(
            f"step '{step.name}' needs about {needed / 1e6:,.1f} MB in {step.folder}, only "
            f"{free / 1e6:,.1f} MB are free: free some or move execution.root"
        )


def _refuse_missing_files(step: PlannedStep) -> None:
    """A finished step whose files have gone must not be taken for finished."""
    manifest = finished_manifest(step)
    if manifest is None:
        return
    names = [*(shard.file for shard in manifest.shards), *manifest.files]
    missing = [name for name in names if not (step.folder / name).is_file()]
    if missing:
        raise StoreError(
            f"{step.folder} has a manifest but {len(missing)} of its files are gone (first: "
            f"{missing[0]}): delete its manifest.json and run again to make them anew"
        )


def verify_step(step: PlannedStep) -> list[str]:
    """Return one line for each thing wrong with a finished table step."""
    manifest = finished_manifest(step)
    return [] if manifest is None else damaged_shards(step.folder, manifest)
