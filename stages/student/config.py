"""Steps about students: make one, train it, measure several. Needs no torch to be planned."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from stages.stage import StageConfig
from stages.student.train_config import TrainConfig, lm_data_problem


class StudentInitStage(StageConfig):
    """Make a student of ``model``: its tokenizer, embeddings, head and some of its layers.

    ``layers`` is a number, kept evenly spaced, or a list of indices.
    """

    VERSION: ClassVar[int] = 1
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("model",)

    stage: Literal["student_init"]
    model: str
    layers: int | tuple[int, ...]


class TrainStage(TrainConfig):
    """Train ``student`` (a checkpoint step or a model) on the joined rows of the ``data`` tables.

    ``data`` names the documents or episodes step first, then the signal steps; ``lm_data`` the
    running text and its signals, for the LM part of ``icl_distillation`` and for nothing else.
    Held-out shards are never trained on: they measure the student before and after.
    """

    VERSION: ClassVar[int] = 1
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("student", "data", "lm_data")

    stage: Literal["train"]
    student: str
    data: tuple[str, ...] = Field(min_length=1)
    lm_data: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _text_where_used(self) -> "TrainStage":
        if problem := lm_data_problem(self.objective, num_tables=len(self.lm_data)):
            raise ValueError(problem)
        return self


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
