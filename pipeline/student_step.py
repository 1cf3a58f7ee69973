"""Train a student, on this machine or on Ray, or measure students and write the report."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.plan import PlannedStep
from pipeline.recipe import Execution
from pipeline.reporter import Reporter
from pipeline.training_job import TrainingJob
from pipeline.working_folder import published, remove_work
from schemas.storage.files import write_text
from schemas.tables.episodes import EPISODES
from stages.models.checkpoints.checkpoint import CheckpointRecord, write_checkpoint
from stages.stage import SourceStage, TableStage
from stages.student.evaluate.stage import EvaluateStage
from stages.student.evaluate_preferences.stage import PreferenceEvaluationStage
from stages.student.train.stage import TrainStage

EVALUATION = "evaluation.json"


def run_training(
    step: PlannedStep, stage: TrainStage, execution: Execution, reporter: Reporter
) -> None:
    """Train in this process, in several of this machine, or on the workers of a Ray cluster."""
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
        from pipeline.ray_training import train_on_ray  # loads ray

        address = execution.address
        train_on_ray(job, execution.training_processes, reporter.trained, address=address)
    elif execution.training_processes == 1:
        job.carry_out(reporter.trained)
    else:
        from pipeline.training_launch import train_in_processes  # loads torch

        train_in_processes(job, execution.training_processes, reporter.trained)
    remove_work(step.place)


def run_evaluation(step: PlannedStep, stage: EvaluateStage, reporter: Reporter) -> None:
    """Measure each student; ``evaluation.json`` has every number of every task."""
    from stages.student.evaluate.icl import evaluate_episodes  # both load torch
    from stages.student.evaluate.positions import evaluate

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


def run_preference_evaluation(
    step: PlannedStep, stage: PreferenceEvaluationStage, reporter: Reporter
) -> None:
    """Measure the students side by side; ``evaluation.json`` has win rates and examples too."""
    from stages.student.evaluate_preferences.work import (  # loads torch
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
