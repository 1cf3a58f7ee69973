"""Stage ``student_init``: which of a model's layers a student is made of."""

from typing import ClassVar, Literal

from stages.stage import FolderStage, Kind


class StudentInitStage(FolderStage):
    """Make a student of ``model``: its tokenizer, embeddings, head and some of its layers.

    ``layers`` is a number, kept evenly spaced, or a list of indices.
    """

    KIND: ClassVar[Kind] = "checkpoint"
    VERSION: ClassVar[int] = 1
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("model",)
    RUNS: ClassVar[tuple[str, ...]] = ("model",)

    stage: Literal["student_init"]
    model: str
    layers: int | tuple[int, ...]
