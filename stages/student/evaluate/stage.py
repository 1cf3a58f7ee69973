"""Stage ``evaluate``: which students are measured, on which held-out rows."""

from typing import ClassVar, Literal

from pydantic import Field

from stages.stage import FolderStage, Kind


class EvaluateStage(FolderStage):
    """Measure ``students`` (checkpoint steps or models) on the held-out rows of ``data``.

    ``data`` is documents or episodes first, then tables about them. ``score`` is how candidates of
    several tokens are compared: by mean or by sum of log-probs.
    """

    KIND: ClassVar[Kind] = "report"
    VERSION: ClassVar[int] = 2
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("students", "data")
    READS: ClassVar[tuple[str, ...]] = ("data",)
    RUNS: ClassVar[tuple[str, ...]] = ("students",)

    stage: Literal["evaluate"]
    students: tuple[str, ...] = Field(min_length=1)
    data: tuple[str, ...] = Field(min_length=1)
    score: Literal["mean", "sum"] = "mean"
