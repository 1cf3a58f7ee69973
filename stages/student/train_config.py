"""What a training run is: every field of ``TrainConfig`` moves the weights and is hashed.

This file needs no torch, so that a recipe is checked and planned without it. Where a run happens
(``TrainOptions``) changes no more than the last bits and is never hashed.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.stage import StageConfig


class CrossEntropyConfig(StageConfig):
    """Next-token cross-entropy on the scored positions: the baseline without a teacher."""

    loss: Literal["cross_entropy"] = "cross_entropy"


class KdConfig(StageConfig):
    """Forward KL to the cached teacher with weight ``weight``, cross-entropy with the rest."""

    loss: Literal["kd"] = "kd"
    weight: float = Field(default=1.0, gt=0.0, le=1.0)


ObjectiveConfig = Annotated[CrossEntropyConfig | KdConfig, Field(discriminator="loss")]


class TrainConfig(StageConfig):
    """A run over cached data: give ``max_steps`` or ``epochs``, not both.

    A step takes ``per_device_batch_size * gradient_accumulation_steps`` rows on each process, and
    its loss is the mean over their scored tokens, however they fall into batches and processes.
    ``dtype`` is that of the matrix products; weights and optimizer state are float32.
    ``warmup`` is a share of all steps.
    """

    objective: ObjectiveConfig = KdConfig()
    lr: float = Field(default=3e-4, gt=0.0)
    max_steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0.0)
    per_device_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: float = Field(default=0.01, ge=0.0)
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give either 'max_steps' or 'epochs'")
        return self


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Where a run happens; never hashed. ``num_workers`` decode rows, 0 decodes in the trainer."""

    device: Literal["auto", "cpu"] = "auto"
    num_workers: int = 1
    eval_batch_size: int = 8
    log_every: int = 5
    checkpoint_every: int = 200
    verify: bool = True
