"""The plan of a probe: planned steps elsewhere, on small tables and the probe's models."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.estimate.sample_tables import take, write_rows
from pipeline.estimate.sizes import Found
from pipeline.planning.plan import Model, PlannedStep
from pipeline.planning.recipe import Execution
from pipeline.state.step_state import is_done
from pipeline.steps.fit import devices_of
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest
from schemas.table import BoundTable
from stages.stage import TableStage

PROBE_TOKENS, PROBE_TOKENS_GPU = 16_384, 262_144  # of each input that a step is probed on


class ProbedPlan:
    """What the probe has made so far, and where: each step after those that it reads."""

    def __init__(
        self,
        plan: Sequence[PlannedStep],
        execution: Execution,
        folder: Path,
        said: Callable[[str], None],
    ) -> None:
        """``folder`` is empty, and takes all that is made; ``said`` is given lines of progress."""
        self.folder, self.said = folder, said
        self.execution = execution
        alone = {"executor": "local", "workers": 1, "training_processes": 1, "report_to": ()}
        self.alone = execution.model_copy(
            update={**alone, "training_sharding": "none", "root": folder}
        )
        self.num_tokens = PROBE_TOKENS_GPU if devices_of(execution) else PROBE_TOKENS
        self.found: dict[str, Found] = {}
        self.probed: dict[Folder, PlannedStep] = {}  # by the place of the planned step
        self.cut = _to_be_cut(plan)
        self.samples: dict[str, set[str]] = {}  # keys of cut tables, by fingerprint

    def moved(self, step: PlannedStep, stage: Any = None) -> PlannedStep:
        """Return the step of the probe: its place, tables and models are the probe's own."""

        def moved(place: Folder) -> Folder:
            return self.probed[place].place if place in self.probed else place

        models: dict[str, Model] = {
            name: replace(
                model, base=moved(model.base), adapter=model.adapter and moved(model.adapter)
            )
            for name, model in step.models.items()
        }
        probed = replace(
            step,
            stage=stage or step.stage,
            place=self.folder / step.name,
            inputs=tuple(self.probed.get(source.place, source) for source in step.inputs),
            models=models,
        )
        self.probed[step.place] = probed
        return probed

    def write_cut(
        self,
        step: PlannedStep,
        bound: BoundTable[Any],
        readers: Mapping[str, Iterator[Any]],
        counts: Mapping[str, int],
        num_shards: int,
        tokenizer: str,
    ) -> Manifest:
        """Write a few of a step's rows, and let the steps of the probe read these.

        ``num_shards`` is how many the whole table has.
        """
        rows = take(readers, counts, self.num_tokens)
        per_shard = math.ceil(sum(counts.values()) / max(1, num_shards))
        self.samples[step.fingerprint] = rows.sample_ids
        probed = self.moved(step)
        assert isinstance(probed.place, Path)
        return write_rows(probed, probed.place, bound, rows, per_shard, tokenizer)


def _to_be_cut(plan: Sequence[PlannedStep]) -> set[str]:
    """Return the finished tables that a step yet to be made maps, or that these are made of."""
    cut: set[str] = set()
    for step in reversed(plan):
        if step.name in cut or (isinstance(step.stage, TableStage) and not is_done(step)):
            cut |= {source.name for source in step.inputs if is_done(source)}
    return cut
