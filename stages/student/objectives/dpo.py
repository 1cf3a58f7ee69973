"""Direct preference optimisation with cached log-probs of the reference.

DPO (arXiv 2305.18290, equation 7), with w the chosen and l the rejected response:

    -log sigmoid(beta [(log pi(w) - log ref(w)) - (log pi(l) - log ref(l))])

Log-probs are sums over a response's tokens. The reference is the student before this training (or
whatever model made the table ``response_logprobs``): two numbers a pair, and no second model in
memory. A mean over the step's pairs. All values in nats.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.student.objectives.objective import Objective, Reads

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class DpoConfig(Objective):
    """Direct preference optimisation against cached log-probs of the reference."""

    loss: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0.0)

    @property
    def reads(self) -> Reads:
        """The pairs, and what the reference says of both responses."""
        return Reads(data=("preference_pairs", "response_logprobs"))

    def batches(self, data: "TrainingData") -> "Batches":
        """Return prompts with both responses and the reference's log-probs of them."""
        from stages.student.batches.pairs import DpoCollator  # loads torch

        return data.rows(DpoCollator(data.vocab_size))

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the loss of one batch, with the reward's margin and accuracy in the log."""
        from stages.student.losses.pairs import dpo_term  # loads torch

        logprobs = step.answer_logprobs(batch["answers"], wrapped=True)
        return [dpo_term(logprobs, batch["reference_logprobs"], beta=self.beta)]
