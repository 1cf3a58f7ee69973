"""What came of a run: students before and after, evaluations, tables."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from pipeline.planning.plan import PlannedStep
from pipeline.reports.cells import count_cell, human_bytes, rejects_cell
from pipeline.reports.preference_report import preference_tables
from pipeline.reports.seeds_report import OF_RESPONSES, columns_of, seeds_table
from pipeline.reports.step_times import measured_time
from pipeline.reports.vectors_report import vectors_report
from pipeline.state.step_state import finished_manifest
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest
from schemas.storage.object_path import ObjectPath
from stages.models.checkpoints.checkpoint import EVALUATION, read_checkpoint
from stages.student.evaluate.stage import EvaluateStage
from stages.student.evaluate_preferences.stage import PreferenceEvaluationStage
from stages.student.objectives.mend import MendConfig
from stages.student.train.stage import TrainStage


def print_results(console: Console, steps: Sequence[PlannedStep]) -> None:
    """Show what a finished run came to: students before and after, size, speed, places."""
    trained = [step for step in steps if isinstance(step.stage, TrainStage)]
    if trained:
        records = [(step, read_checkpoint(step.place)) for step in trained]
        results = [(step, record.metrics) for step, record in records if record is not None]
        console.print(_students_table(results))
        measured = [(step, metrics["after"]) for step, metrics in results]
        if (over_seeds := seeds_table(measured)) is not None:
            console.print(over_seeds)
    for step in steps:
        if isinstance(step.stage, EvaluateStage):
            for part in _evaluation(step, step.stage):
                console.print(part)
        if isinstance(step.stage, PreferenceEvaluationStage):
            body = json.loads((step.place / EVALUATION).read_text())
            for table in preference_tables(body, title=step.name):
                console.print(table)
    tables = [step for step in steps if step.writes_table]
    if tables:
        console.print(_tables_table(tables))
    for step in tables:
        for line in measures_lines(step.name, finished_manifest(step)):
            console.print(line, highlight=False, soft_wrap=True)
    for step in steps:
        console.print(f"{step.name}: {step.place}", highlight=False, soft_wrap=True)


def print_metrics(
    console: Console, name: str, metrics: Mapping[str, Any], *, as_json: bool
) -> None:
    """Show the numbers of one evaluation."""
    if as_json:
        console.print_json(json.dumps({"student": name, **metrics}))
        return
    table = Table("metric", "value", title=name)
    for key, value in metrics.items():
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def _students_table(results: Sequence[tuple[PlannedStep, Mapping[str, Any]]]) -> Table:
    columns = columns_of([found for _, one in results for found in (one["before"], one["after"])])
    table = Table("student", *columns, title="held-out rows")
    seen: set[tuple[str, ...]] = set()
    trained = {step.name for step, _ in results}
    for step, metrics in results:
        before = tuple(_metric_cells(metrics["before"], columns))
        if before not in seen:
            seen.add(before)
            start = next(iter(step.models))
            when = f"before {step.name}" if start in trained else "untrained"
            table.add_row(f"{start}, {when}", *before)
    for step, metrics in results:
        table.add_row(_name(step), *_metric_cells(metrics["after"], columns))
    return table


def _name(step: PlannedStep) -> str:
    """Return a training step's name, and that its reader is not the teacher where it is not."""
    objective = step.stage.objective if isinstance(step.stage, TrainStage) else None
    is_cross_model = isinstance(objective, MendConfig) and objective.cross_model
    return f"{step.name} (cross_model)" if is_cross_model else step.name


# Numbers of a step that measures students; one that no student has is left out.
MEASURED = {
    "KL to teacher": "kl_to_teacher",
    "top-1 agreement": "top1_agreement",
    "cross-entropy": "cross_entropy",
    "bits per byte": "bits_per_byte",
    "cross-entropy of answers": "answer_cross_entropy",
    "KL to teacher over candidates": "candidate_kl",
    "same candidate as teacher": "candidate_agreement",
    "rank agreement on subsets, tau-b": "subset_rank_correlation",
    "same best subset": "best_subset_agreement",
    "same worst subset": "worst_subset_agreement",
    "accuracy": "accuracy",
    "macro-F1": "macro_f1",
    "accuracy of the vote": "vote_accuracy",
    "P@1": "precision_at_1",
    "P@10": "precision_at_10",
    "exact match": "exact_match",
    **OF_RESPONSES,
}
BASELINES = ("majority", "random", "teacher")


def _evaluation(step: PlannedStep, stage: EvaluateStage) -> Iterator[RenderableType]:
    record = read_checkpoint(step.place)
    measured = {} if record is None else record.metrics
    if stage.reader is not None and measured:
        yield from vectors_report(measured, stage.students, step.name)
    else:
        yield _evaluation_table(
            step.name, [name for name in step.models if name in measured], measured
        )


def _evaluation_table(
    title: str, students: Sequence[str], measured: Mapping[str, Mapping[str, float]]
) -> Table:
    """One column a student, and what the majority, chance and the teacher's cache give."""
    first = measured[students[0]] if students else {}
    table = Table("", *students, *(f"({name})" for name in BASELINES), title=title)
    for header, name in MEASURED.items():
        cells = [_number(measured[student].get(name)) for student in students]
        if any(cell != "-" for cell in cells):
            baselines = [_number(first.get(f"{prefix}_{name}")) for prefix in BASELINES]
            table.add_row(header, *cells, *baselines)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _metric_cells(metrics: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    return [f"{metrics[name]:.3f}" if name in metrics else "-" for name in columns.values()]


def _tables_table(steps: Sequence[PlannedStep]) -> Table:
    table = Table("table", "rows", "tokens", "bytes", "B/token", "positions/s", "rejected")
    tokens_of_text, bytes_of_all = 0, 0
    num_sources = sum(not step.inputs for step in steps)
    for step in steps:
        manifest = finished_manifest(step)
        if manifest is None:
            continue
        size = folder_bytes(step.place)
        tokens_of_text = max(tokens_of_text, manifest.num_tokens)
        bytes_of_all += size
        speed = measured_time(step.place, manifest).positions_per_s
        table.add_row(
            f"{step.name} ({manifest.variant or manifest.table})",
            count_cell(manifest.num_rows),
            count_cell(manifest.num_tokens),
            human_bytes(size),
            f"{size / manifest.num_tokens:.1f}" if manifest.num_tokens else "-",
            "-" if speed is None else f"{speed:.0f}",
            rejects_cell(step),
        )
    if tokens_of_text:
        total = f"{bytes_of_all / tokens_of_text:.1f}" if num_sources == 1 else "-"
        table.add_row("total on disk", "", "", human_bytes(bytes_of_all), total, "", "")
    return table


def measures_lines(name: str, manifest: Manifest | None) -> Iterator[str]:
    """Yield what a table's manifest measures of all its rows, in one line."""
    if manifest is not None and manifest.measures:
        values = (f"{key} {value:.6g}" for key, value in manifest.measures.items())
        yield f"{name}: {', '.join(values)}"


def folder_bytes(folder: Folder) -> int:
    """Return the bytes of every file of a step: shards, records, rejects, manifest."""
    if isinstance(folder, ObjectPath):
        return sum(folder.find().values())
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
