"""What every objective says of itself: its settings, its tables, its batches and its loss.

An objective *is* its configuration, as a stage is, and each is one file of this folder. Planning
loads these files, so nothing in them loads torch before a training run asks: decoding is in
``batches``, the maths in ``losses``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from schemas.dataset import CachedDataset
from schemas.errors import ConfigError
from stages.stage import StageConfig

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


@dataclass(frozen=True, slots=True)
class Reads:
    """The tables an objective reads: those of ``data``, and of ``lm_data`` where it reads text.

    Of ``one_of``, which are about samples too, ``data`` has any one.
    """

    data: tuple[str, ...] = ()
    lm_data: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()


class Objective(StageConfig, ABC):
    """What a student is trained for; ``loss`` names it in a recipe."""

    USES_READER: ClassVar[bool] = False  # what is trained is a distiller before a frozen reader
    PACKS: ClassVar[bool] = False  # rows of a batch may lie end to end in one

    loss: str

    @property
    @abstractmethod
    def reads(self) -> Reads:
        """The tables it needs; others may lie beside them."""

    @abstractmethod
    def batches(self, data: "TrainingData") -> "Batches":
        """Return the rows of a run and what makes a batch of some of them."""

    @abstractmethod
    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the loss of one of its batches."""

    def lm_data_problem(self, num_tables: int) -> str:
        """Return what is wrong with the number of ``lm_data`` tables, ``""`` if nothing is."""
        if num_tables and not self.reads.lm_data:
            return (
                f"'lm_data' has {num_tables} tables that objective '{self.loss}' would not read: "
                f"leave it out, or use icl_distillation with lm_weight > 0"
            )
        return ""

    def require(self, dataset: CachedDataset, lm_dataset: CachedDataset | None) -> None:
        """Raise ConfigError unless the opened tables hold what the objective reads."""
        num_tables = len(lm_dataset.manifests) if lm_dataset is not None else 0
        if problem := self.lm_data_problem(num_tables):
            raise ConfigError(problem)
        needed = [(table,) for table in self.reads.data]
        one_of = [self.reads.one_of] if self.reads.one_of else []
        self._require([*one_of, *needed], dataset, "data")
        if lm_dataset is not None:
            self._require([(table,) for table in self.reads.lm_data], lm_dataset, "lm_data")

    def _require(
        self, needed: Sequence[tuple[str, ...]], dataset: CachedDataset, name: str
    ) -> None:
        found = [manifest.table for manifest in dataset.manifests]
        for tables in needed:
            if not set(tables).intersection(found):
                article = "an" if tables[0][0] in "aeiou" else "a"
                raise ConfigError(
                    f"objective '{self.loss}' needs {article} {' or '.join(tables)} table, the "
                    f"{name} has: {', '.join(found)}; add the step that makes it to {name}"
                )
