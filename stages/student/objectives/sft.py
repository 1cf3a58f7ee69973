"""Supervised fine-tuning on responses: cross-entropy of their tokens, the last included.

Of preference pairs the chosen response is learnt, of conversations what is scored. A mean over the
step's response tokens; prompts are not learnt. The end-of-turn token is a token
like any other, so a student learns to stop; a response that was cut has none, and teaches nothing
of the kind. All values in nats.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stages.student.objectives.objective import Objective, Reads

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class SftConfig(Objective):
    """Cross-entropy on chosen responses of pairs, or answers of conversations: all their tokens."""

    PACKS: ClassVar[bool] = True
    SHARDS: ClassVar[bool] = True

    loss: Literal["sft"] = "sft"

    @property
    def reads(self) -> Reads:
        """Pairs or conversations."""
        return Reads(rows=("preference_pairs", "conversations"))

    def batches(self, data: "TrainingData") -> "Batches":
        """Return the responses, each after its prompt."""
        if data.dataset.manifests[0].table == "conversations":
            return data.rows(data.tokens())
        from stages.student.batches.pairs import ChosenCollator  # loads torch

        return data.rows(ChosenCollator(data.tokens()))

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the loss of one batch."""
        from stages.student.losses.cross_entropy import CrossEntropy  # loads torch

        return [step.over_positions(batch, CrossEntropy(batch["next_token_ids_N"]))]
