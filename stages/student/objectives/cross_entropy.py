"""Next-token cross-entropy on the scored positions: the baseline without a teacher."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stages.student.objectives.objective import TEXT, Objective, Reads

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class CrossEntropyConfig(Objective):
    """Next-token cross-entropy on the scored positions: the baseline without a teacher."""

    PACKS: ClassVar[bool] = True
    SHARDS: ClassVar[bool] = True

    loss: Literal["cross_entropy"] = "cross_entropy"

    @property
    def reads(self) -> Reads:
        """The rows alone."""
        return Reads(rows=(*TEXT, "aligned_spans"))

    def batches(self, data: "TrainingData") -> "Batches":
        """Return rows of any tables; a teacher's columns, if any, are left out."""
        return data.rows(data.tokens())

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the loss of one batch."""
        from stages.student.losses.cross_entropy import CrossEntropy  # loads torch

        return [step.over_positions(batch, CrossEntropy(batch["next_token_ids_N"]))]
