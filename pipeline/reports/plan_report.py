"""The plan of a recipe and how far it is, for people and as JSON."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.planning.plan import PlannedStep, needs
from pipeline.planning.recipe import Recipe
from pipeline.reports.cells import count_cell, human_bytes, rejects_cell
from pipeline.state.audit_state import AuditState, audit_state
from pipeline.state.step_state import (
    Progress,
    calibration_of,
    finished_manifest,
    is_done,
    progress_of,
    rounding_cost_of,
)
from schemas.storage.object_path import ObjectPath
from schemas.storage.shard_list import ShardTotals


def print_plan(
    console: Console, recipe: Recipe, steps: Sequence[PlannedStep], *, as_json: bool
) -> None:
    """Show each step: what it is, whether it is done and why, what it will come to."""
    found = [(step, progress_of(step)) for step in steps]
    if as_json:
        _print_json(steps, recipe.execution.group_size)
        return
    table = Table("step", "stage", "state", "why", "shards", "rows", "bytes", title=recipe.name)
    for step, progress in found:
        about = "about " if progress.estimated else ""
        table.add_row(
            step.name,
            step.stage.stage,
            progress.state,
            progress.why,
            _of(step, progress),
            count_cell(progress.num_rows),
            "-" if progress.num_bytes is None else about + human_bytes(progress.num_bytes),
        )
    console.print(table)
    root = recipe.execution.root
    free = "" if isinstance(root, ObjectPath) else f"{human_bytes(_free_bytes(root))} free, "
    console.print(
        f"root {root}: {free}{_left([progress for _, progress in found])}",
        highlight=False,
        soft_wrap=True,
    )
    for step, _ in found:
        console.print(f"{step.name}: {step.place}", highlight=False, soft_wrap=True)


def print_status(
    console: Console, recipe: Recipe, steps: Sequence[PlannedStep], *, as_json: bool
) -> None:
    """Show how far each step is and what it holds."""
    if as_json:
        _print_json(steps, recipe.execution.group_size)
        return
    found = [(step, progress_of(step)) for step in steps]
    table = Table("step", "state", "shards", "rows", "positions", "B/position", "rejected", "audit")
    for step, progress in found:
        per_position = "-"
        if progress.num_positions and progress.num_bytes is not None:
            per_position = f"{progress.num_bytes / progress.num_positions:.1f}"
        table.add_row(
            step.name,
            progress.state,
            _of(step, progress),
            count_cell(progress.num_rows),
            count_cell(progress.num_positions),
            per_position,
            rejects_cell(step),
            str(_audit(step)),
        )
    console.print(table)
    for step in steps:
        for measured in (calibration_of(step), rounding_cost_of(step)):
            if measured is not None:
                console.print(f"{step.name}: {measured}", highlight=False, soft_wrap=True)


def print_group(console: Console, step: PlannedStep, made: ShardTotals) -> None:
    """Say what a run of some shards came to, and what is left to do."""
    size = human_bytes(made.num_bytes)
    rest = f"`teachercache run --step {step.name}` makes the rest and the manifest"
    if is_done(step):
        rest = "the whole step is done"
    console.print(
        f"{step.name}: {made.num_shards} shards finished, {made.num_rows:,} rows, {size}, in "
        f"{step.place}; {rest}",
        highlight=False,
        soft_wrap=True,
    )


def _left(found: Sequence[Progress]) -> str:
    """Say what there is to write: steps that make no table, or wait for one, foretell nothing."""
    left = [progress.num_bytes for progress in found if progress.state != "done"]
    known = sum(size for size in left if size is not None)
    unknown = left.count(None)
    about = f"about {human_bytes(known)} to write"
    if not unknown:
        return about
    steps = f"{unknown} step{'s' if unknown > 1 else ''} of unknown size"
    return f"{about} and {steps}" if known else f"{steps} to write"


def _print_json(plan: Sequence[PlannedStep], group_size: int) -> None:
    """Print what machines read, on one line: it may be the last line of a log."""
    print(json.dumps([_as_dict(plan, step, group_size) for step in plan]))  # noqa: T201


def _as_dict(plan: Sequence[PlannedStep], step: PlannedStep, group_size: int) -> dict[str, Any]:
    progress = progress_of(step)
    in_groups = step.kind == "table" and progress.num_shards is not None
    return {
        "name": step.name,
        "stage": step.stage.stage,
        "kind": step.kind,
        "needs": [needed.name for needed in needs(plan, step)],
        "fingerprint": step.fingerprint,
        "folder": str(step.place),
        **asdict(progress),
        "has_audit": step.stage.has_audit,
        "audit": _audit(step).as_dict(),
        "groups": _groups(progress.num_shards or 0, group_size) if in_groups else None,
    }


def _groups(num_shards: int, group_size: int) -> list[str]:
    """Return the groups of shards as ``run --shards`` takes them: ``0:16``, ``16:24``."""
    starts = range(0, num_shards, group_size)
    return [f"{start}:{min(start + group_size, num_shards)}" for start in starts]


def _audit(step: PlannedStep) -> AuditState:
    manifest = finished_manifest(step) if step.writes_table else None
    return AuditState() if manifest is None else audit_state(step.place, manifest.dataset_id)


def _of(step: PlannedStep, progress: Progress) -> str:
    if not step.writes_table:
        return "-"
    total = "?" if progress.num_shards is None else str(progress.num_shards)
    return f"{progress.shards_done}/{total}"


def _free_bytes(path: Path) -> int:
    """Return what is free where a folder is, or would be made."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
