"""Stage ``distiller_init``: a small causal LM -> an untrained distiller for a reader."""

from typing import ClassVar, Literal

from pydantic import Field

from stages.stage import FolderStage, Kind


class DistillerInitStage(FolderStage):
    """Make a distiller of ``model``, whose vectors are fed to ``reader``; see MEND (2403.06914).

    Both have one tokenizer. ``num_vectors`` prompt embeddings begin as rows of the vocabulary,
    drawn by ``seed``, and a projection, where widths differ, with random weights by it.
    """

    KIND: ClassVar[Kind] = "checkpoint"
    VERSION: ClassVar[int] = 1
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("model", "reader")
    RUNS: ClassVar[tuple[str, ...]] = ("model", "reader")
    ENCODER_DECODERS: ClassVar[tuple[str, ...]] = ("model", "reader")

    stage: Literal["distiller_init"]
    model: str
    reader: str
    num_vectors: int = Field(default=100, ge=1)
    seed: int = 0
