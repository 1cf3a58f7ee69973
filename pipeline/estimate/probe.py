"""The probe: each step's own work on a few rows, one step after another, in a temporary folder.

A step of the probe is the planned step with another place, on the probe's tables and models. So the
product's own code makes its shards, on the engine that the recipe names.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.estimate.folder_probe import probe_folder, probe_training
from pipeline.estimate.measures import folder_bytes
from pipeline.estimate.probed_plan import ProbedPlan
from pipeline.estimate.sizes import Found, Size
from pipeline.estimate.table_probe import cut_finished, probe_pieces, probe_source, probe_table
from pipeline.planning.plan import PlannedStep
from pipeline.planning.recipe import Execution
from pipeline.state.step_state import finished_manifest, is_done
from pipeline.steps.fit import model_memory, num_parameters
from schemas.errors import TeacherCacheError
from schemas.storage.files import Folder
from stages.file_map import FileMapStage
from stages.stage import FolderStage, SourceStage, TableStage
from stages.student.train.stage import TrainStage

_ADAM_BYTES = 16  # a parameter: weight, gradient and two moments, all float32


class Probe:
    """Looks at the steps of a plan in order, each after those that it reads."""

    def __init__(
        self,
        plan: Sequence[PlannedStep],
        execution: Execution,
        folder: Path,
        said: Callable[[str], None],
    ) -> None:
        """``folder`` is empty, and takes all that is made; ``said`` is given lines of progress."""
        self.plan = ProbedPlan(plan, execution, folder, said)
        self._unknown: set[Folder] = set()

    def look_at(self, step: PlannedStep) -> Found:
        """Find out what a step comes to."""
        self.plan.said(f"{step.name}: {'is done' if is_done(step) else 'probing'}")
        try:
            found = self._look_at(step)
        except TeacherCacheError as error:
            if step.writes_table:
                raise
            self._unknown.add(step.place)
            found = Found(found_by=f"not known: {error}")
        if isinstance(step.stage, TableStage | TrainStage) and not is_done(step):
            found = replace(found, memory=self._memory(step))
        self.plan.found[step.name] = found
        return found

    def _look_at(self, step: PlannedStep) -> Found:
        if is_done(step):
            return self._finished(step)
        places = {source.place for source in step.inputs}
        places |= {place for m in step.models.values() for place in (m.base, m.adapter) if place}
        if places & self._unknown:
            self._unknown.add(step.place)
            return Found(found_by="not known: it reads what is not known")
        match step.stage:
            case FileMapStage() as stage:
                return probe_pieces(self.plan, step, stage)
            case SourceStage() as stage:
                return probe_source(self.plan, step, stage)
            case TableStage() as stage:
                return probe_table(self.plan, step, stage)
            case TrainStage() as stage:
                return probe_training(self.plan, step, stage)
            case FolderStage() as stage:
                return probe_folder(self.plan, step, stage)
        raise AssertionError(step.stage)

    def _finished(self, step: PlannedStep) -> Found:
        manifest = finished_manifest(step) if step.writes_table else None
        if manifest is None:
            size = folder_bytes(step.place) if isinstance(step.place, Path) else None
            return Found(num_bytes=size, seconds=0.0, found_by="finished")
        if step.name in self.plan.cut:
            cut_finished(self.plan, step, manifest)
        return Found(
            size=Size.of(manifest),
            num_bytes=manifest.num_bytes,
            seconds=0.0,
            found_by="its manifest",
        )

    def _memory(self, step: PlannedStep) -> dict[str, int] | None:
        models = self.plan.probed.get(step.place, step).models
        there = {n: m for n, m in models.items() if (m.base / "config.json").is_file()}
        if not there:
            return None
        if isinstance(step.stage, TrainStage):
            student = there.get(step.stage.student)
            weights = 0 if student is None else num_parameters(student.base) * _ADAM_BYTES
            return {"weights": weights, "head": 0, "cache": 0}
        each = [model_memory(name, model, self.plan.execution) for name, model in there.items()]
        largest = max(each, key=lambda memory: memory.least_bytes)
        parts = (largest.weight_bytes, largest.head_bytes, largest.cache_bytes)
        return dict(zip(("weights", "head", "cache"), parts, strict=True))
