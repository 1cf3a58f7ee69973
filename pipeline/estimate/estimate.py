"""What a recipe will come to: each step's rows, tokens, bytes, time and memory, and their sums."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.estimate.probe import Probe
from pipeline.estimate.sizes import Found
from pipeline.planning.plan import PlannedStep
from pipeline.planning.recipe import Recipe
from pipeline.state.step_state import Progress, progress_of
from pipeline.steps.fit import Memory, devices_of, free_disk, free_memory
from stages.stage import TableStage
from stages.student.train.stage import TrainStage


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """One step; what is not known is None.

    ``num_bytes`` is of the whole step, ``left_bytes`` and ``seconds`` of what is not there yet.
    ``spread`` is how far the true size may be off, as a fraction, where rows are only known from a
    share of the files. ``memory`` has ``weights``, ``head`` and ``cache`` in bytes a worker.
    """

    name: str
    stage: str
    state: str
    num_rows: int | None
    num_tokens: int | None
    num_positions: int | None
    num_bytes: int | None
    left_bytes: int | None
    start_seconds: float | None
    seconds: float | None
    spread: float
    found_by: str
    memory: dict[str, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeEstimate:
    """All steps, and what there is room for. ``free_disk`` of a store is None: it has no end."""

    recipe: str
    root: str
    steps: tuple[StepEstimate, ...]
    free_disk: int | None
    memory: Memory | None
    probe_seconds: float

    @property
    def left_bytes(self) -> int:
        """Bytes to write, of the steps that are known."""
        return sum(step.left_bytes or 0 for step in self.steps)

    @property
    def seconds(self) -> float:
        """Seconds to work, of the steps that are known."""
        return sum(step.seconds or 0.0 for step in self.steps)

    @property
    def unknown(self) -> list[str]:
        """Names of steps whose bytes or time are not known."""
        return [step.name for step in self.steps if None in (step.left_bytes, step.seconds)]

    def problems(self) -> list[str]:
        """Return, a line each, what will not fit."""
        found = []
        if self.free_disk is not None and self.left_bytes > self.free_disk:
            found.append(
                f"{self.left_bytes / 1e6:,.1f} MB to write, only {self.free_disk / 1e6:,.1f} MB "
                f"are free in {self.root}"
            )
        for step in self.steps:
            if step.memory is None or self.memory is None or step.state == "done":
                continue
            needed = step.memory["weights"] + step.memory["head"]
            if needed > self.memory.free_bytes:
                found.append(
                    f"{step.name}: {needed / 1e9:,.1f} GB for weights and head, only "
                    f"{self.memory.free_bytes / 1e9:,.1f} GB of {self.memory.device} are free"
                )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        return asdict(self) | {
            "left_bytes": self.left_bytes,
            "seconds": self.seconds,
            "unknown": self.unknown,
            "problems": self.problems(),
        }


def estimate_recipe(
    recipe: Recipe, plan: Sequence[PlannedStep], said: Callable[[str], None]
) -> RecipeEstimate:
    """Probe every step that is not done, in a temporary folder, and extrapolate.

    Nothing is written into the recipe's root. Raises what the steps themselves raise.
    """
    began = time.perf_counter()
    execution = recipe.execution
    with tempfile.TemporaryDirectory(prefix="teachercache-estimate-") as folder:
        probe = Probe(plan, execution, Path(folder), said)
        steps = tuple(_step_estimate(step, probe, recipe) for step in plan)
    return RecipeEstimate(
        recipe=recipe.name,
        root=str(execution.root),
        steps=steps,
        free_disk=free_disk(execution.root),
        memory=free_memory(execution) if execution.executor == "local" else None,
        probe_seconds=time.perf_counter() - began,
    )


def _step_estimate(step: PlannedStep, probe: Probe, recipe: Recipe) -> StepEstimate:
    progress = progress_of(step)
    found = probe.look_at(step)
    left = _share_left(progress)
    seconds = None
    if found.seconds is not None:
        width = _side_by_side(step, recipe, found)
        seconds = (found.start_seconds + left * found.seconds / width) if left else 0.0
    return StepEstimate(
        name=step.name,
        stage=step.stage.stage,
        state=progress.state,
        num_rows=found.size.num_rows if step.writes_table and found.size else None,
        num_tokens=found.size.num_tokens if step.writes_table and found.size else None,
        num_positions=found.size.num_positions if step.writes_table and found.size else None,
        num_bytes=found.num_bytes,
        left_bytes=None if found.num_bytes is None else round(left * found.num_bytes),
        start_seconds=found.start_seconds if left else 0.0,
        seconds=seconds,
        spread=found.spread,
        found_by=found.found_by,
        memory=found.memory,
    )


def _share_left(progress: Progress) -> float:
    if progress.state == "done":
        return 0.0
    if not progress.num_shards:
        return 1.0
    return 1.0 - progress.shards_done / progress.num_shards


def _side_by_side(step: PlannedStep, recipe: Recipe, found: Found) -> float:
    """Return how much faster the step goes than the probe, which had one worker.

    Workers of one machine without GPUs share its cores: they gain what the probe left idle, which
    is known only where each has a number of threads.
    """
    execution = recipe.execution
    is_alone = execution.executor == "local" and not devices_of(execution)
    if isinstance(step.stage, TrainStage):
        return 1.0 if is_alone else float(execution.training_processes)
    if not isinstance(step.stage, TableStage) and step.kind != "table":
        return 1.0
    workers = min(execution.workers, max(1, found.size.num_shards if found.size else 1))
    if is_alone:
        cores = os.cpu_count() or 1
        workers = min(workers, max(1, cores // (execution.engine.num_threads or cores)))
    return float(workers)
