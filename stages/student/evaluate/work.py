"""The work of ``evaluate``: each student by itself, then one report of all."""

from typing import Any

from schemas.storage.manifest import read_manifest
from schemas.tables.episodes import EPISODES
from stages.models.checkpoints.checkpoint import CheckpointRecord, write_evaluation
from stages.stage import StepJob
from stages.student.evaluate.icl import evaluate_episodes
from stages.student.evaluate.positions import evaluate
from stages.student.evaluate.stage import EvaluateStage


def make(stage: EvaluateStage, job: StepJob) -> None:
    """Measure each student; ``evaluation.json`` has every number of every task."""
    of_episodes = read_manifest(job.tables[0]).table == EPISODES.name
    reports: dict[str, Any] = {}
    metrics: dict[str, dict[str, float]] = {}
    for name, model in job.models.items():
        job.said(f"measuring {name}")
        if of_episodes:
            report = evaluate_episodes(model.path, job.tables, scoring=stage.score)
            reports[name], metrics[name] = report.as_dict(), report.summary()
        else:
            reports[name] = metrics[name] = evaluate(model.path, job.tables)
    record = CheckpointRecord(fingerprint=job.fingerprint, identity=job.identity, metrics=metrics)
    write_evaluation(job.output, reports, record)
