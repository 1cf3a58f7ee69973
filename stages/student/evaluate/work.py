"""The work of ``evaluate``: each student by itself, then one report of all."""

from collections.abc import Sequence
from typing import Any

from schemas.storage.manifest import read_manifest
from schemas.tables.episodes import EPISODES
from stages.models.checkpoints.checkpoint import CheckpointRecord, write_evaluation
from stages.stage import StepJob
from stages.student.evaluate.by_row import Row, RowScores, write_rows
from stages.student.evaluate.icl import evaluate_episodes
from stages.student.evaluate.positions import evaluate
from stages.student.evaluate.stage import EvaluateStage
from stages.student.evaluate.vectors import evaluate_vectors, is_cross_model


def make(stage: EvaluateStage, job: StepJob) -> None:
    """Measure each student; ``evaluation.json`` has every number of every task.

    ``rows.arrow`` has a line for each student and held-out row (``by_row``, ``icl_rows``).
    """
    reports: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    if stage.reader is not None:
        reports, metrics = _of_distillers(stage, job)
    else:
        reports, metrics = _of_students(stage, job)
    record = CheckpointRecord(fingerprint=job.fingerprint, identity=job.identity, metrics=metrics)
    write_evaluation(job.output, reports, record)


def _of_distillers(
    stage: EvaluateStage, job: StepJob
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    assert stage.reader is not None
    job.said(f"measuring {', '.join(stage.students)}")
    distillers = {name: job.models[name].path for name in stage.students}
    reader = job.models[stage.reader].path
    found = evaluate_vectors(distillers, reader, job.tables, scoring=stage.score)
    # The reader is the last of the step's models.
    label = {"cross_model": float(is_cross_model(job.identity["models"][-1], job.tables))}
    write_rows(job.output, {name: report.rows for name, report in found.items()})
    return (
        {name: report.as_dict() for name, report in found.items()},
        {name: report.summary() | label for name, report in found.items()},
    )


def _of_students(
    stage: EvaluateStage, job: StepJob
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    of_episodes = read_manifest(job.tables[0]).table == EPISODES.name
    reports: dict[str, Any] = {}
    metrics: dict[str, dict[str, float]] = {}
    by_row: dict[str, Sequence[Row]] = {}
    for name, model in job.models.items():
        job.said(f"measuring {name}")
        if of_episodes:
            report = evaluate_episodes(model.path, job.tables, scoring=stage.score)
            reports[name], metrics[name] = report.as_dict(), report.summary()
            by_row[name] = report.rows
        else:
            scores = RowScores()
            reports[name] = metrics[name] = evaluate(model.path, job.tables, by_row=scores)
            by_row[name] = scores.rows
    write_rows(job.output, by_row)
    return reports, metrics
