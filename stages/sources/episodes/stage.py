"""Stage ``episodes``: few-shot tasks -> the ``episodes`` table of demonstrations, query and answer.

Two paradigms (In-context Learning Distillation, arXiv 2212.10670, figures 1 and 2). ``meta``: train
on the tasks that are not ``targets``. ``multitask``: train on ``support`` examples of each target.
In both, the held-out split is the targets' other examples, each asked after demonstrations from the
target's ``support`` examples.

Two ways to draw training episodes. ``partition`` (BiAlign, arXiv 2312.17055, section 4.1): cut the
shuffled examples into groups of k demonstrations and a query, so that each example is used once.
``resample`` (In-context Tuning): every example is a query, ``draws`` times, with k others as its
demonstrations. Held-out episodes are always resampled. Draws are made once and kept: where the
papers redraw in every epoch, give ``draws`` as many.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from schemas.table import Table
from schemas.tables.episodes import EPISODES
from stages.sources.episodes.templates import EpisodeTemplate, TemplateName
from stages.sources.tasks.sources import TaskSource
from stages.stage import SourceStage, StageConfig


class DemonstrationRange(StageConfig):
    """A number of demonstrations drawn anew for each episode, ``min`` to ``max``, both included."""

    min: int = Field(ge=0)
    max: int

    @model_validator(mode="after")
    def _in_order(self) -> "DemonstrationRange":
        if self.max < self.min:
            raise ValueError(f"max is {self.max}, expected at least min ({self.min})")
        return self


class EpisodesStage(SourceStage):
    """Read tasks, split and draw their examples, tokenise.

    ``support`` is the number of a target's examples that serve as demonstrations of its held-out
    episodes (and, in ``multitask``, as training data). ``queries_per_task`` bounds the held-out
    queries of a task, ``max_examples_per_task`` all its examples. ``distinct_labels`` draws only
    demonstrations whose label is not the query's. ``max_length`` is in tokens; ``draws`` counts
    draws per query. ``control_tokens`` is about examples that spell a special token: ``keep`` it as
    that token, ``split`` it into ordinary ones, or ``reject`` the example.
    """

    VERSION: ClassVar[int] = 2

    stage: Literal["episodes"]
    sources: tuple[TaskSource, ...] = Field(min_length=1)
    targets: tuple[str, ...] = ()
    paradigm: Literal["meta", "multitask"]
    demonstrations: DemonstrationRange | int
    draw: Literal["partition", "resample"]
    draws: int = Field(default=1, ge=1)
    support: int = Field(default=32, ge=1)
    queries_per_task: int | None = Field(default=None, ge=1)
    max_examples_per_task: int | None = Field(default=None, ge=2)
    distinct_labels: bool = False
    control_tokens: Literal["keep", "split", "reject"] = "keep"
    template: TemplateName | EpisodeTemplate = "metaicl"
    max_length: int = Field(ge=2)
    seed: int = 0
    rows_per_shard: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "EpisodesStage":
        fewest, most = self.demonstration_range
        needed = most + 1 if self.paradigm == "multitask" and self.draw == "resample" else most
        problem = ""
        if fewest < 0:
            problem = f"demonstrations is {fewest}, expected at least 0"
        elif self.support < needed:
            problem = (
                f"support is {self.support}, but {most} demonstrations are drawn from it"
                f"{', beside the query' if needed > most else ''}: expected at least {needed}"
            )
        elif self.distinct_labels and self.draw == "partition":
            problem = "distinct_labels chooses demonstrations by query: it needs draw: resample"
        elif self.paradigm == "multitask" and not self.targets:
            problem = "paradigm multitask trains on its targets: name them in 'targets'"
        elif len(set(self.targets)) < len(self.targets):
            problem = "targets names a task twice"
        if problem:
            raise ValueError(problem)
        return self

    @property
    def demonstration_range(self) -> tuple[int, int]:
        """The fewest and the most demonstrations of an episode."""
        if isinstance(self.demonstrations, int):
            return self.demonstrations, self.demonstrations
        return self.demonstrations.min, self.demonstrations.max

    @property
    def table(self) -> Table[Any]:
        """The table this stage writes."""
        return EPISODES

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content: ``control_tokens`` where they are not kept."""
        body = super().hashed()
        if self.control_tokens == "keep":
            del body["config"]["control_tokens"]
        return body

    def source_identity(self) -> dict[str, Any]:
        """Return each source's settings with name, size and sha256 of its files."""
        return {
            "sources": [source.settings() | {"files": source.identity()} for source in self.sources]
        }
