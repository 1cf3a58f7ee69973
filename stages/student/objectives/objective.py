"""What every objective says of itself: its settings, its tables, its batches and its loss.

An objective *is* its configuration, as a stage is, and each is one file of this folder. Planning
loads these files, so nothing in them loads torch before a training run asks: decoding is in
``batches``, the maths in ``losses``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from schemas.errors import ConfigError
from stages.stage import StageConfig, TableRef
from stages.student.batches.several_datasets import ROWS

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


TableKind = tuple[str, str]  # a table's name and variant
TEXT = ROWS  # each holds rows of token ids as they are


@dataclass(frozen=True, slots=True)
class Reads:
    """The tables an objective reads: those of ``data``, and of ``lm_data`` where it reads text.

    Of ``rows``, where there are any, ``data`` has to have one.
    """

    data: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    lm_data: tuple[str, ...] = ()


class Objective(StageConfig, ABC):
    """What a student is trained for; ``loss`` names it in a recipe."""

    USES_READER: ClassVar[bool] = False  # what is trained is a distiller before a frozen reader
    PACKS: ClassVar[bool] = False  # rows of a batch may lie end to end in one
    SEVERAL: ClassVar[bool] = False  # data may be several data sets, each with its own signals
    SHARDS: ClassVar[bool] = False  # a batch is one forward on each process, whatever is in it

    loss: str

    @property
    @abstractmethod
    def reads(self) -> Reads:
        """The tables it needs; others may lie beside them."""

    @property
    def selects(self) -> tuple[str, ...]:
        """Tables of ``data`` that decide where it trains: held-out rows are measured without."""
        return ()

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

    def require(self, data: Sequence[TableKind], lm_data: Sequence[TableKind]) -> None:
        """Raise ConfigError unless these tables, by name and variant, are what it reads."""
        if problem := self.lm_data_problem(len(lm_data)):
            raise ConfigError(problem)
        rows = [self.reads.rows] if self.reads.rows else []
        self._require([*rows, *((table,) for table in self.reads.data)], data, "data")
        if lm_data:
            self._require([(table,) for table in self.reads.lm_data], lm_data, "lm_data")

    def check(self, tables: Sequence[TableRef]) -> None:
        """Raise ConfigError for tables of a plan that are of other rows or models than it asks."""

    def check_logged(self, means: Mapping[str, float], step: int) -> None:
        """Raise ConfigError where what a step logged says that the run has to end."""

    def _require(
        self, needed: Sequence[tuple[str, ...]], tables: Sequence[TableKind], name: str
    ) -> None:
        found = [table for table, _ in tables]
        for table in found:
            if found.count(table) > 1:
                raise ConfigError(
                    f"{name}: {found.count(table)} of its tables are {table}, expected one of each "
                    f"kind: name one of them"
                )
        for choices in needed:
            if not set(choices) & set(found):
                article = "an" if choices[0][0] in "aeiou" else "a"
                wanted = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
                raise ConfigError(
                    f"{name}: objective '{self.loss}' needs {article} {wanted} "
                    f"table, the {name} has: {', '.join(found)}; add the step that makes it to "
                    f"{name}"
                )
