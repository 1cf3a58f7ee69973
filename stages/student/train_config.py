"""What a training run is: every field of ``TrainConfig`` moves the weights and is hashed.

This file needs no torch, so that a recipe is checked and planned without it. Where a run happens
(``TrainOptions``) changes no more than the last bits and is never hashed.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.errors import ConfigError
from stages.stage import StageConfig


class CrossEntropyConfig(StageConfig):
    """Next-token cross-entropy on the scored positions: the baseline without a teacher."""

    loss: Literal["cross_entropy"] = "cross_entropy"


class KdConfig(StageConfig):
    """Forward KL to the cached teacher with weight ``weight``, cross-entropy with the rest."""

    loss: Literal["kd"] = "kd"
    weight: float = Field(default=1.0, gt=0.0, le=1.0)


class BiAlignConfig(StageConfig):
    """Forward KL on whole few-shot sequences plus ``rank_weight`` times the ranking loss.

    ``detach_range`` keeps the ranking loss's denominator out of the gradient. ``kl_reduction`` is
    the mean over tokens, or the sum over each sample's, averaged over samples.
    """

    loss: Literal["bialign"] = "bialign"
    rank_weight: float = Field(default=1.0, gt=0.0)
    detach_range: bool = True
    kl_reduction: Literal["mean", "sum"] = "mean"


CandidateScore = Literal["mean", "sum"]


class IclDistillationConfig(StageConfig):
    """Gold answers with weight alpha, the teacher's choice among candidates with the rest.

    Alpha goes in a line from ``alpha_start`` at the first step to ``alpha_end`` at the last; both 1
    is in-context tuning, which needs no teacher. ``lm_weight`` adds the same on running text.
    """

    loss: Literal["icl_distillation"] = "icl_distillation"
    lm_weight: float = Field(default=0.2, ge=0.0)
    alpha_start: float = Field(default=1.0, ge=0.0, le=1.0)
    alpha_end: float = Field(default=0.0, ge=0.0, le=1.0)
    candidate_score: CandidateScore = "mean"

    @property
    def needs_teacher(self) -> bool:
        """Whether some step looks at the teacher."""
        return min(self.alpha_start, self.alpha_end) < 1.0


class SftConfig(StageConfig):
    """Cross-entropy on the chosen responses of preference pairs, over all their tokens."""

    loss: Literal["sft"] = "sft"


class DpoConfig(StageConfig):
    """Direct preference optimisation against cached log-probs of the reference."""

    loss: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0.0)


class DckdConfig(StageConfig):
    """Cross-entropy on chosen responses, forward KL to the teacher on chosen and rejected ones.

    The defaults are the published code's; the paper's alpha stands before two KLs of weight 1.
    """

    loss: Literal["dckd"] = "dckd"
    sft_weight: float = Field(default=1.0, ge=0.0)
    alpha: float = Field(default=1.0, gt=0.0)
    chosen_weight: float = Field(default=0.1, ge=0.0)
    rejected_weight: float = Field(default=0.1, ge=0.0)

    @model_validator(mode="after")
    def _teacher_is_used(self) -> "DckdConfig":
        if not self.chosen_weight + self.rejected_weight:
            raise ValueError("chosen_weight and rejected_weight are both 0: use loss sft")
        return self


class AdpaConfig(StageConfig):
    """Cross-entropy on chosen responses less ``gamma`` times the expected advantage.

    ``as_released`` clips advantages to [1e-8, 1 - 1e-8] as the published code does, and reads
    that code's support alone; ``paper`` takes them as they are, from any other.
    """

    loss: Literal["adpa"] = "adpa"
    mode: Literal["paper", "as_released"] = "paper"
    sft_weight: float = Field(default=1.0, ge=0.0)
    gamma: float = Field(default=1.6, gt=0.0)


ObjectiveConfig = Annotated[
    CrossEntropyConfig
    | KdConfig
    | BiAlignConfig
    | IclDistillationConfig
    | SftConfig
    | DpoConfig
    | DckdConfig
    | AdpaConfig,
    Field(discriminator="loss"),
]


class TrainConfig(StageConfig):
    """A run over cached data: give ``max_steps`` or ``epochs``, not both.

    A step takes ``per_device_batch_size * gradient_accumulation_steps`` rows, on one process or
    divided over several (``share``), and its loss is the mean over their scored tokens (ICL and
    preference losses: over the rows), however they fall into batches and processes.
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

    @property
    def rows_per_step(self) -> int:
        """The rows of one step, over all processes."""
        return self.per_device_batch_size * self.gradient_accumulation_steps

    def share(self, num_processes: int) -> tuple[int, int]:
        """Return the rows of a batch and the batches of a step on each of several processes.

        Accumulated batches are dealt out first, then batches are made smaller. Raises ConfigError
        where the rows of a step cannot be divided.
        """
        batch_size, accumulation = self.per_device_batch_size, self.gradient_accumulation_steps
        dealt = math.gcd(accumulation, num_processes)
        smaller, left = divmod(batch_size, num_processes // dealt)
        if left:
            raise ConfigError(
                f"a step of {batch_size} x {accumulation} = {self.rows_per_step} rows "
                f"(per_device_batch_size x gradient_accumulation_steps) cannot be divided over "
                f"{num_processes} processes: take a number of processes that divides it"
            )
        return smaller, accumulation // dealt


def lm_data_problem(objective: ObjectiveConfig, *, num_tables: int) -> str:
    """Return what is wrong with the number of ``lm_data`` tables, ``""`` if nothing is."""
    wants_text = isinstance(objective, IclDistillationConfig) and objective.lm_weight > 0
    if wants_text and not num_tables:
        return (
            "objective 'icl_distillation' with lm_weight > 0 needs 'lm_data' (a documents table "
            "and its signals), got none: name it, or set lm_weight to 0"
        )
    if num_tables and not wants_text:
        return (
            f"'lm_data' has {num_tables} tables that objective '{objective.loss}' would not read: "
            f"leave it out, or use icl_distillation with lm_weight > 0"
        )
    return ""


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Where a run happens; never hashed. ``num_workers`` decode rows, 0 decodes in the trainer.

    ``micro_batch_tokens`` bounds a forward over subsets and candidates, whose number is not that of
    the rows; activations of one such forward are held at a time.
    """

    device: Literal["auto", "cpu"] = "auto"
    num_workers: int = 1
    eval_batch_size: int = 8
    log_every: int = 5
    checkpoint_every: int = 200
    micro_batch_tokens: int = 8192
    verify: bool = True
