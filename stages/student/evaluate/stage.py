"""Stage ``evaluate``: which students are measured, on which held-out rows."""

from typing import ClassVar, Literal

from pydantic import Field

from stages.stage import StageConfig


class EvaluateStage(StageConfig):
    """Measure ``students`` (checkpoint steps or models) on the held-out rows of ``data``.

    ``data`` is documents or episodes first, then tables about them. ``score`` is how candidates of
    several tokens are compared: by mean or by sum of log-probs.
    """

    VERSION: ClassVar[int] = 1
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("students", "data")

    stage: Literal["evaluate"]
    students: tuple[str, ...] = Field(min_length=1)
    data: tuple[str, ...] = Field(min_length=1)
    score: Literal["mean", "sum"] = "mean"
