"""Probes of steps that leave a folder: a few steps of training, a report of a few rows."""

import math
from dataclasses import replace
from pathlib import Path

from pipeline.estimate.measures import Clock, folder_bytes
from pipeline.estimate.probed_plan import ProbedPlan
from pipeline.estimate.sizes import Found, Size
from pipeline.planning.data_sets import data_sets
from pipeline.planning.plan import PlannedStep
from pipeline.state.step_state import finished_manifest
from pipeline.steps.folder_step import run_folder
from pipeline.steps.training_step import run_training
from stages.stage import FolderStage
from stages.student.train.stage import TrainStage

_STEPS = 10  # of training; the trainer tells every fifth


def probe_training(plan: ProbedPlan, step: PlannedStep, stage: TrainStage) -> Found:
    """Train a few steps on the probe's tables; held-out rows are measured before and after."""
    train_rows = num_heldout = num_sampled = 0
    for first, *_ in data_sets(step):
        source = plan.found[first.name].size
        sampled = finished_manifest(plan.probed.get(first.place, first))
        assert source is not None and sampled is not None
        train_rows += source.num_rows - source.num_heldout
        num_heldout += source.num_heldout
        num_sampled += Size.of(sampled).num_heldout
    steps = stage.max_steps or math.ceil(
        (stage.epochs or 1.0) * math.ceil(train_rows / stage.rows_per_step)
    )
    short = {"max_steps": min(steps, _STEPS), "epochs": None, "early_stopping": None}
    probed = plan.moved(step, stage.model_copy(update={**short, "max_missing_fraction": 0.999}))
    clock = Clock(plan.said)
    run_training(probed, probed.stage, plan.alone, clock)  # type: ignore[arg-type]
    line, heldout = clock.step_line(), clock.heldout_seconds()
    times_more = num_heldout / max(1, num_sampled)
    assert isinstance(probed.place, Path)
    return Found(
        num_bytes=folder_bytes(probed.place),
        start_seconds=max(0.0, line.start - 2 * heldout),
        seconds=line.slope * steps + 2 * heldout * times_more,
        spread=0.0,
        found_by=f"{short['max_steps']} of {steps} steps",
    )


def probe_folder(plan: ProbedPlan, step: PlannedStep, stage: FolderStage) -> Found:
    """Let the stage fill its folder: training a few steps, a report of the probe's rows."""
    steps = None
    if getattr(stage, "max_steps", None) or getattr(stage, "epochs", None):
        source = plan.found[step.inputs[0].name].size
        assert source is not None
        each = stage.per_device_batch_size * stage.gradient_accumulation_steps  # type: ignore[attr-defined]
        rows = math.ceil((source.num_rows - source.num_heldout) / each)
        steps = stage.max_steps or math.ceil(stage.epochs * rows)  # type: ignore[attr-defined]
        stage = stage.model_copy(update={"max_steps": min(steps, _STEPS), "epochs": None})
    probed = plan.moved(step, stage)
    clock = Clock(plan.said)
    run_folder(probed, stage, clock)
    assert isinstance(probed.place, Path)
    num_bytes = folder_bytes(probed.place)
    if steps is not None:
        line = clock.step_line()
        found_by = f"{min(steps, _STEPS)} of {steps} steps"
        seconds = line.slope * steps
        return Found(
            num_bytes=num_bytes, start_seconds=line.start, seconds=seconds, found_by=found_by
        )
    if step.kind != "report":
        return Found(num_bytes=num_bytes, start_seconds=clock.seconds, seconds=0.0, found_by="made")
    return _report(plan, step, probed, clock.seconds, num_bytes)


def _report(
    plan: ProbedPlan, step: PlannedStep, probed: PlannedStep, first_seconds: float, num_bytes: int
) -> Found:
    """A report is made twice: the first time loads libraries and warms up."""
    source = plan.found[step.inputs[0].name].size
    sampled = finished_manifest(probed.inputs[0])
    assert source is not None and sampled is not None
    clock = Clock(plan.said)
    again = replace(probed, place=plan.folder / f"{step.name}.again")
    run_folder(again, again.stage, clock)  # type: ignore[arg-type]
    rows = Size.of(sampled).num_heldout
    times_more = source.num_heldout / max(1, rows)
    return Found(
        num_bytes=num_bytes,
        start_seconds=max(0.0, first_seconds - clock.seconds),
        seconds=clock.seconds * times_more,
        found_by=f"{rows} of {source.num_heldout} held-out rows",
    )
