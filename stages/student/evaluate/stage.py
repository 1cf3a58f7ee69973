"""Stage ``evaluate``: which students are measured, on which held-out rows."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from schemas.errors import ConfigError
from schemas.tables.demonstrations import DEMONSTRATIONS
from stages.models.encoder_decoder.kind import kinds_problem
from stages.stage import FolderStage, Kind, TableRef

# What stands beside distillers (see ``before_query``), and numbers that only theirs have.
ZERO_SHOT, RANDOM, POOLED = "zero-shot", "random vectors", "mean pooling"
FEWER, ALL = "fewer shots", "all demonstrations"
BESIDE = (ZERO_SHOT, RANDOM, POOLED, FEWER, ALL)
POSITIONS, BEYOND_WINDOW = "positions_before_query", "rows_beyond_window"
WITHOUT_SHOTS = "rows_without_demonstration"


class EvaluateStage(FolderStage):
    """Measure ``students`` (checkpoint steps or models) on the held-out rows of ``data``.

    ``data`` is documents or episodes first, then tables about them. ``score`` is how candidates of
    several tokens are compared: by mean or by sum of log-probs. With a ``reader`` students are
    distillers, and ``data`` is demonstrations first.
    """

    KIND: ClassVar[Kind] = "report"
    VERSION: ClassVar[int] = 3
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("data", "reader")  # students: the report names them
    READS: ClassVar[tuple[str, ...]] = ("data",)
    RUNS: ClassVar[tuple[str, ...]] = ("students", "reader")
    ENCODER_DECODERS: ClassVar[tuple[str, ...]] = ("reader",)

    stage: Literal["evaluate"]
    students: tuple[str, ...] = Field(min_length=1)
    data: tuple[str, ...] = Field(min_length=1)
    score: Literal["mean", "sum"] = "mean"
    reader: str | None = None

    def check(self, tables: Sequence[TableRef], models: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse a reader before other tables, and a reader that is measured as a student too."""
        if self.reader is None:
            return
        if tables[0].table.name != DEMONSTRATIONS.name:
            raise ConfigError(
                f"data: step '{tables[0].step}' writes {tables[0].table.name}, with a reader the "
                f"first is a table of {DEMONSTRATIONS.name}: name that, or leave 'reader' out"
            )
        if self.reader in self.students:
            raise ConfigError(f"students: '{self.reader}' is the reader, expected distillers")
        made_by = {table.step: table.made_by for table in tables}
        if problem := kinds_problem(models[self.reader], made_by):
            raise ConfigError(f"reader: '{self.reader}' {problem}")
