"""Stage ``distiller_init``: a small causal LM -> an untrained distiller for a reader."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from stages.stage import FolderStage, Kind


class DistillerInitStage(FolderStage):
    """Make a distiller of ``model``, whose vectors are fed to ``reader``; see MEND (2403.06914).

    Both have one tokenizer. ``num_vectors`` prompt embeddings begin as rows of the vocabulary,
    drawn by ``seed``, and a projection, where widths differ, with random weights by it.
    ``lora_rank`` trains low-rank updates of the model's linear layers in the place of its weights,
    times ``lora_alpha`` / ``lora_rank`` (by default 2).
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
    lora_rank: int | None = Field(default=None, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _alpha_where_used(self) -> "DistillerInitStage":
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError(
                f"lora_alpha is {self.lora_alpha:g} without lora_rank: set lora_rank, or leave it "
                f"out to train the distiller in full"
            )
        return self

    @property
    def alpha(self) -> float:
        """LoRA's alpha, 0 without it."""
        return float(2 * (self.lora_rank or 0) if self.lora_alpha is None else self.lora_alpha)

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content: LoRA where there is any."""
        body = super().hashed()
        del body["config"]["lora_rank"], body["config"]["lora_alpha"]
        if self.lora_rank is not None:
            body["config"] |= {"lora_rank": self.lora_rank, "lora_alpha": self.alpha}
        return body
