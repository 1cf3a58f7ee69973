"""What a run tells of itself, in order; ``progress`` prints it."""

from typing import Any, Protocol

from pipeline.planning.plan import PlannedStep
from pipeline.planning.recipe import Execution
from pipeline.state.step_state import Progress
from schemas.storage.records import ShardRecord
from stages.models.spec import ModelSpec
from stages.stage import SignalStage, Stage, StageContext

ENGINES = {"vllm": "vLLM", "transformers": "transformers"}  # as a person writes them


class Reporter(Protocol):
    """Told what happens, in order; prints it or drives a progress bar."""

    def step_started(self, step: PlannedStep, progress: Progress) -> None:
        """A step begins, or is found done (``progress.state``)."""

    def said(self, line: str) -> None:
        """A line about work that has no shards to count yet."""

    def extending(self, line: str) -> None:
        """Rows of finished tables are copied: how many, of which."""

    def engine_starting(self, what: str) -> None:
        """An engine is about to start on a model, which takes a while."""

    def shards_expected(self, num_shards: int, num_finished: int) -> None:
        """How many shards the step has, and how many an earlier run finished."""

    def shard_finished(self, record: ShardRecord) -> None:
        """One more shard is on disk."""

    def warned(self, line: str) -> None:
        """Something went wrong that the run makes good by itself."""

    def trained(self, values: dict[str, Any]) -> None:
        """The trainer reports a step or an evaluation."""

    def step_finished(self, step: PlannedStep) -> None:
        """The step is complete."""


def engines_starting(
    stage: Stage, context: StageContext, execution: Execution, reporter: Reporter
) -> None:
    """Say which models' engines start; no other stage than a signal's starts any."""
    for _, name in stage.named(stage.RUNS) if isinstance(stage, SignalStage) else ():
        reporter.engine_starting(_on(context.models[name], execution.workers))


def _on(model: ModelSpec, workers: int) -> str:
    adapted = f" with {model.adapter}" if model.adapter is not None else ""
    crew = f", in {workers} workers" if workers > 1 else ""
    return f"{ENGINES[model.engine]} on {model.base}{adapted}{crew}"
