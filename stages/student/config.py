"""The checkpoint steps of a recipe: make a student, train it. Needs no torch to be planned."""

from typing import ClassVar, Literal

from pydantic import Field

from stages.stage import StageConfig
from stages.student.train_config import TrainConfig


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

    ``data`` names the documents step first, then the signal step. Held-out shards are never
    trained on: they measure the student before and after.
    """

    VERSION: ClassVar[int] = 1
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("student", "data")

    stage: Literal["train"]
    student: str
    data: tuple[str, ...] = Field(min_length=1)
