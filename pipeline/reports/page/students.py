"""Students on the page: how training went, and what held-out rows say of each."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.planning.plan import PlannedStep
from pipeline.reports.page.charts import bars, curves, thinned
from pipeline.reports.page.sampled_rows import READ_ERRORS
from schemas.errors import first_line
from schemas.storage.files import read_if_there
from stages.models.checkpoints.checkpoint import EVALUATION, CheckpointRecord, read_checkpoint
from stages.student.evaluate.stage import EvaluateStage
from stages.student.evaluate_preferences.stage import PreferenceEvaluationStage
from stages.student.train.stage import TrainStage

# What a log says beside losses; the curves of these come last or not at all.
LAST = ("tokens_per_s", "learning_rate", "grad_norm")
NO_CURVE = ("step", "epoch", "total_flos", "samples_per_s", "answer_tokens_per_s")
NATS = (
    *("loss", "kl", "kl_to_teacher", "cross_entropy", "kl_to_baseline"),
    *("reverse_kl", "staleness", "staleness_k1"),
)
MOST_CHARTS = 12  # of held-out numbers in one report


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing, what it says in words, and its numbers as a table."""

    title: str
    svg: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(slots=True)
class Students:
    """All that finished steps left of students; ``problems`` are of steps that cannot be read."""

    curves: list[Chart] = field(default_factory=list)
    heldout: list[tuple[str, list[Chart]]] = field(default_factory=list)
    rows_read: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def students_of(steps: Sequence[PlannedStep]) -> Students:
    """Read every training step and evaluation of a plan that is finished."""
    found = Students()
    trained: dict[str, CheckpointRecord] = {}
    for step in steps:
        try:
            if isinstance(step.stage, TrainStage) and (record := read_checkpoint(step.place)):
                trained[step.name] = record
            elif isinstance(step.stage, EvaluateStage) and (record := read_checkpoint(step.place)):
                found.heldout.append((step.name, _heldout(record.metrics)))
            elif isinstance(step.stage, PreferenceEvaluationStage):
                found.heldout += _preferences(step)
        except READ_ERRORS as error:
            found.problems.append(f"{step.name}: {first_line(error)}")
    for name, record in trained.items():
        summary = record.metrics.get("train", {})
        if "samples" in summary:
            found.rows_read[name] = summary["samples"]
        if "seconds" in summary:
            found.seconds[name] = summary["seconds"]
    found.curves = _curves(
        {name: [*record.history, *record.speeds] for name, record in trained.items()}
    )
    if own := _before_after(trained):
        found.heldout.insert(0, ("before and after training", own))
    return found


def _curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Chart]:
    points: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for student, history in histories.items():
        by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in history:
            for name, value in entry.items():
                if name not in NO_CURVE and not name.startswith("num_"):
                    at = {"x": entry.get("step", 0), "y": value, "series": student}
                    by_name[name].append(at)
        for name, found in by_name.items():
            points[name] += thinned(found)
    shown = [name for name, found in points.items() if not _says_nothing(name, found, "y")]
    shown.sort(
        key=lambda name: (name in LAST, LAST.index(name) if name in LAST else name != "loss")
    )
    return [_curve(name, points[name], list(histories)) for name in shown]


def _curve(name: str, points: list[dict[str, Any]], order: Sequence[str]) -> Chart:
    title = _words(name) + (" (nats)" if name in NATS else "")
    svg = curves(points, x="step", y=title, about=f"{title} by training step", order=order)
    rows = [(p["series"], f"{p['x']:g}", f"{p['y']:.5g}") for p in points]
    return Chart(title, svg, ("student", "step", title), rows)


def _before_after(trained: Mapping[str, CheckpointRecord]) -> list[Chart]:
    return _charts(
        (student, when, record.metrics.get(when, {}))
        for student, record in trained.items()
        for when in ("before", "after")
    )


def _heldout(metrics: Mapping[str, Mapping[str, float]]) -> list[Chart]:
    return _charts((name, "student", numbers) for name, numbers in metrics.items())


def _preferences(step: PlannedStep) -> list[tuple[str, list[Chart]]]:
    text = read_if_there(step.place / EVALUATION)
    if text is None or read_checkpoint(step.place) is None:
        return []
    body = json.loads(text)
    rows = [(name, "student", found) for name, found in body["students"].items()]
    rows += [(name, "data", found) for name, found in body["data"].items()]
    return [(step.name, _charts(rows))]


def _charts(measured: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[Chart]:
    """Return a chart for each number that any student has; its deviations and counts have none."""
    points: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for student, series, numbers in measured:
        for name, value in numbers.items():
            if isinstance(value, int | float) and not _is_aside(name, numbers):
                points[name].append({"name": student, "series": series, "x": value})
    charts = []
    shown = [name for name, found in points.items() if not _says_nothing(name, found, "x")]
    for name in shown[:MOST_CHARTS]:
        title = _words(name)
        rows = [(p["name"], p["series"], f"{p['x']:.5g}") for p in points[name]]
        svg = bars(points[name], about=f"{title} of each student")
        charts.append(Chart(title, svg, ("student", "", title), rows))
    return charts


def _is_aside(name: str, numbers: Mapping[str, Any]) -> bool:
    """Whether a number only goes with another one: a deviation, the end of an interval, a count."""
    endings = ("_deviation", "_low", "_high")
    is_count = name.startswith("num_") or name in ("tokens", "cross_model")
    return name.endswith(endings) or is_count or isinstance(numbers[name], bool)


def _says_nothing(name: str, points: Sequence[Mapping[str, Any]], value: str) -> bool:
    """Whether a number is only of interest where it is not 0, or says what another one does."""
    is_zero = all(not point[value] for point in points)
    return name == "perplexity" or (name in ("dropped_mass", "rows_without_partner") and is_zero)


def _words(name: str) -> str:
    """Return a number's name as a person reads it."""
    fixed = {"tokens_per_s": "tokens/s", "kl": "KL", "top1_agreement": "top-1 agreement"}
    return fixed.get(name, name.replace("_", " ").replace("kl ", "KL ").replace("cross ", "cross-"))
