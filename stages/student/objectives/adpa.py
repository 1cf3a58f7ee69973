"""ADPA: learn the chosen responses, and on the student's own follow the teacher's advantages.

ADPA (arXiv 2502.17927, equation 11), with A the cached advantage and y' the student's response:

    sft_weight NLL(chosen) - gamma E_{y'} [1/|y'| sum_t sum_a pi(a | s_t) A(s_t, a)]

Means over tokens are taken response by response, as in the paper. The stop token of a finished
response is a position like any other. What the cache keeps of A decides the inner sum: see
``losses.advantage``. ``mode: as_released`` is the published code's: the aligned teacher's likeliest
tokens alone, advantages clipped to [1e-8, 1 - 1e-8], which erases every negative one, and no beta.
All values in nats.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from schemas.errors import ConfigError
from stages.student.objectives.objective import Objective, Reads, TableKind

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class AdpaConfig(Objective):
    """Cross-entropy on chosen responses less ``gamma`` times the expected advantage.

    ``as_released`` clips advantages to [1e-8, 1 - 1e-8] as the published code does, and reads
    that code's support alone; ``paper`` takes them as they are, from any other.
    """

    SHARDS: ClassVar[bool] = True

    loss: Literal["adpa"] = "adpa"
    mode: Literal["paper", "as_released"] = "paper"
    sft_weight: float = Field(default=1.0, ge=0.0)
    gamma: float = Field(default=1.6, gt=0.0)

    @property
    def reads(self) -> Reads:
        """The pairs, the student's responses to their prompts, and the advantages on those."""
        return Reads(data=("preference_pairs", "responses", "advantages"))

    def require(self, data: Sequence[TableKind], lm_data: Sequence[TableKind]) -> None:
        """Refuse the published code's advantages too: they are another quantity."""
        super().require(data, lm_data)
        support = dict(data)["advantages"]
        if (support == "as_released") != (self.mode == "as_released"):
            raise ConfigError(
                f"data: objective 'adpa' in mode '{self.mode}' cannot read advantages of support "
                f"'{support}': mode as_released reads support as_released, mode paper any other"
            )

    def batches(self, data: "TrainingData") -> "Batches":
        """Return chosen responses, then the student's own with their advantages."""
        from stages.student.batches.pairs import AdpaCollator  # loads torch

        return data.rows(AdpaCollator.of(data.dataset, data.vocab_size, data.num_token_ids))

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the NLL of the chosen responses and minus the expected advantage."""
        from stages.student.losses.advantage import Advantage, support_of  # both load torch
        from stages.student.losses.pairs import nll_of_chosen

        hidden_ND = step.hidden_states(batch)
        own = slice(batch["num_chosen"], len(hidden_ND))
        clipped = self.mode == "as_released"
        support = support_of(batch["advantages"], step.advantage_heads, clipped=clipped)
        advantage = Advantage(support, batch["weights_N"][own])
        return [
            nll_of_chosen(batch, hidden_ND, step, self.sft_weight),
            replace(step.over(hidden_ND[own], advantage, "samples"), weight=self.gamma),
        ]
