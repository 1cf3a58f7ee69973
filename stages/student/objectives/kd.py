"""Forward KL to a cached teacher, mixed with cross-entropy: ``w KL(p || s) + (1 - w) CE``.

Hinton et al. 2015 (arXiv 1503.02531), their soft target. We differ in temperature: always 1, as the
cache holds the raw distribution. What the KL is for each encoding is in ``losses.kl``.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.student.objectives.objective import TEXT, Objective, Reads

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class KdConfig(Objective):
    """Forward KL to the cached teacher with weight ``weight``, cross-entropy with the rest."""

    PACKS: ClassVar[bool] = True
    SHARDS: ClassVar[bool] = True

    loss: Literal["kd"] = "kd"
    weight: float = Field(default=1.0, gt=0.0, le=1.0)

    @property
    def reads(self) -> Reads:
        """The rows and the teacher's distributions."""
        return Reads(data=("teacher_logits",), rows=TEXT)

    def batches(self, data: "TrainingData") -> "Batches":
        """Return the rows with the teacher's distributions."""
        return data.rows(data.signals())

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the loss of one batch."""
        from stages.student.losses.kl import Kd, teacher_of  # loads torch

        teacher = teacher_of(batch, step.teacher_head)
        return [step.over_positions(batch, Kd(batch["next_token_ids_N"], teacher, self.weight))]
