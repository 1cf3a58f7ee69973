"""What evaluations of a recipe say: each student's numbers over all tasks, and row by row.

Dimensions: E = episodes.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.planning.plan import PlannedStep
from stages.student.evaluate.by_row import read_rows

TEACHER = "teacher"

Array = npt.NDArray[Any]


def read_overall(step: PlannedStep) -> dict[str, dict[str, float]]:
    """Return each student's numbers over all tasks."""
    body = json.loads((step.folder / "evaluation.json").read_text())
    return {name: report["overall"] for name, report in body.items()}


def rows_of(step: PlannedStep, tasks: str, column: str = "right") -> dict[str, Array]:
    """Return [E] a column of each student's rows of ``tasks``, by id; ``right`` of the teacher too.

    ``right`` is whether an episode is answered.
    """
    found: dict[str, dict[str, float]] = {}
    for row in read_rows(step.folder).to_pylist():
        if row["task"].startswith(tasks):
            found.setdefault(row["student"], {})[row["sample_id"]] = row[column]
            if column == "right" and row.get("teacher_right") is not None:
                found.setdefault(TEACHER, {})[row["sample_id"]] = row["teacher_right"]
    return {
        name: np.array([by_id[sample] for sample in sorted(by_id)], np.float64)
        for name, by_id in found.items()
    }


def tasks_of(step: PlannedStep, tasks: str) -> Array:
    """Return [E] which task each of the rows of ``tasks`` is of, by id."""
    found = {row["sample_id"]: row["task"] for row in read_rows(step.folder).to_pylist()}
    return np.array([found[sample] for sample in sorted(found) if found[sample].startswith(tasks)])
