"""Stage ``teacher_align``: preference pairs -> an aligned teacher, by DPO (arXiv 2305.18290).

The checkpoint it makes is a model that later steps name; its own model is the reference of all
advantages.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from stages.stage import FolderStage, Kind, StageConfig


class AlignConfig(StageConfig):
    """A DPO run: give ``max_steps`` or ``epochs``, not both.

    ``lora_rank`` trains an adapter of that rank on all linear layers and merges it at the end;
    without it all weights are trained. ``warmup`` is a share of all steps.
    """

    beta: float = Field(default=0.1, gt=0.0)
    lr: float = Field(default=5e-7, gt=0.0)
    max_steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0.0)
    per_device_batch_size: int = Field(default=4, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    lora_rank: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> "AlignConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give either 'max_steps' or 'epochs'")
        return self


class TeacherAlignStage(AlignConfig, FolderStage):
    """Align ``model`` on the train rows of ``data``, a step that writes preference pairs."""

    KIND: ClassVar[Kind] = "checkpoint"
    VERSION: ClassVar[int] = 1
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("model", "data")
    READS: ClassVar[tuple[str, ...]] = ("data",)
    RUNS: ClassVar[tuple[str, ...]] = ("model",)

    stage: Literal["teacher_align"]
    model: str
    data: str

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content; a run of one step warms up no more."""
        warms_up_no_more = self.max_steps == 1 and self.warmup > 0
        return super().hashed() | ({"warmup_steps": 0} if warms_up_no_more else {})
