"""DCKD: imitate the aligned teacher on chosen and on rejected responses, and learn the chosen ones.

DCKD (arXiv 2502.17927, first stage of ADPA), with p the teacher and s the student:

    sft_weight NLL(chosen) + alpha [chosen_weight KL(p || s | chosen)
                                    + rejected_weight KL(p || s | rejected)]

Each part is a mean over a response's tokens, then over the step's pairs: the published code's mean
over a micro-batch of one pair. The end-of-turn token of a finished response is a position like any
other (the code leaves it out). We differ from the code in its KL over the teacher's 50 likeliest
tokens and one bucket, in half precision: here the encoding of the cache decides (see ``losses.kl``;
``top_k`` with k = 50 is that bucket, without the code's clamp to [1e-8, 1 - 1e-8]).

All values in nats.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from stages.student.objectives.objective import Objective, Reads

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class DckdConfig(Objective):
    """Cross-entropy on chosen responses, forward KL to the teacher on chosen and rejected ones.

    The defaults are the published code's; the paper's alpha stands before two KLs of weight 1.
    """

    SHARDS: ClassVar[bool] = True

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

    @property
    def reads(self) -> Reads:
        """The pairs, and the aligned teacher's distributions on both responses."""
        return Reads(data=("preference_pairs", "teacher_logits"))

    def batches(self, data: "TrainingData") -> "Batches":
        """Return chosen and rejected responses with the teacher's distributions on them."""
        from stages.student.batches.pairs import DckdCollator  # loads torch

        return data.rows(DckdCollator(data.signals()))

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the losses of the chosen and of the rejected responses."""
        from stages.student.losses.pairs import side_term  # loads torch

        hidden_ND = step.hidden_states(batch)
        num_chosen = batch["num_chosen"]
        chosen, rejected = slice(0, num_chosen), slice(num_chosen, len(hidden_ND))
        kl_weights = self.alpha * self.chosen_weight, self.alpha * self.rejected_weight
        return [
            side_term(step, batch, chosen, hidden_ND, "chosen", self.sft_weight, kl_weights[0]),
            side_term(step, batch, rejected, hidden_ND, "rejected", 0.0, kl_weights[1]),
        ]
