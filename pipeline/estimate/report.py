"""An estimate as a person reads it, and as JSON."""

import json

from rich.console import Console
from rich.table import Table

from pipeline.estimate.estimate import RecipeEstimate, StepEstimate
from pipeline.reports.cells import count_cell, human_bytes
from pipeline.steps.fit import OVERRIDE


def print_estimate(console: Console, found: RecipeEstimate, *, as_json: bool) -> None:
    """Print a row for each step, then what they come to beside what is free."""
    if as_json:
        print(json.dumps(found.as_dict()))  # noqa: T201
        return
    table = Table(
        *("step", "stage", "rows", "tokens", "bytes", "time", "found by"), title=found.recipe
    )
    for step in found.steps:
        table.add_row(
            step.name,
            step.stage,
            _counted(step, step.num_rows),
            _counted(step, step.num_tokens),
            "?" if step.num_bytes is None else human_bytes(step.num_bytes),
            _time_cell(step),
            step.found_by,
        )
    console.print(table)
    for line in _lines(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def human_time(seconds: float) -> str:
    """Return a time in the two largest units that it has."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _counted(step: StepEstimate, value: int | None) -> str:
    about = f" ±{step.spread:.0%}" if value is not None and step.spread >= 0.005 else ""
    return count_cell(value) + about


def _time_cell(step: StepEstimate) -> str:
    if step.state == "done":
        return "done"
    return "?" if step.seconds is None else human_time(step.seconds)


def _lines(found: RecipeEstimate) -> list[str]:
    free = (
        "no limit: a store" if found.free_disk is None else f"{human_bytes(found.free_disk)} free"
    )
    lines = [
        f"to write: {human_bytes(found.left_bytes)} in {found.root} ({free})",
        f"to work: {human_time(found.seconds)} (the probe took {human_time(found.probe_seconds)})",
    ]
    for step in found.steps:
        if step.memory is not None:
            parts = ", ".join(f"{name} {human_bytes(n)}" for name, n in step.memory.items() if n)
            lines.append(f"memory a worker, {step.name}: {parts}")
    if found.memory is not None:
        lines.append(f"{found.memory.device}: {human_bytes(found.memory.free_bytes)} free")
    if found.unknown:
        lines.append(f"not in the sums: {', '.join(found.unknown)}")
    lines += [
        f"does not fit: {problem} (`run` refuses; {OVERRIDE} starts it)"
        for problem in found.problems()
    ]
    return lines
