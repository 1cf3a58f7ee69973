"""Approximate likelihood matching: learn from a teacher of another tokenizer, span by span.

ALM (arXiv 2503.20083): ``w tau D(p || q) + (1 - w) CE``, where D is between two outcomes, that the
text goes on with a span's bytes or not, at temperature tau. What it is and where we differ is in
``losses.spans``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from schemas.errors import ConfigError
from stages.student.objectives.objective import Objective, Reads, TableKind

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class AlmConfig(Objective):
    """Match the teacher's log-probs of spans with weight ``weight``, cross-entropy with the rest.

    ``temperature`` is the paper's tau, 100 in its experiments. ``entries_weight`` adds a lower
    bound of the KL where spans begin, from variant ``entries`` of the table.
    """

    PACKS: ClassVar[bool] = True
    SHARDS: ClassVar[bool] = True

    loss: Literal["alm"] = "alm"
    weight: float = Field(default=1.0, gt=0.0, le=1.0)
    temperature: float = Field(default=100.0, gt=0.0, allow_inf_nan=False)
    entries_weight: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @property
    def reads(self) -> Reads:
        """Text in the student's tokens, with the teacher's log-probs of its spans."""
        return Reads(data=("aligned_spans",))

    def batches(self, data: "TrainingData") -> "Batches":
        """Return the rows with their spans."""
        from stages.student.batches.spans import SpansCollator  # loads torch

        return data.rows(SpansCollator(data.tokens(), entries=self.entries_weight > 0))

    def require(self, data: Sequence[TableKind], lm_data: Sequence[TableKind]) -> None:
        """Raise ConfigError, too, where entries are weighed and the table has none."""
        super().require(data, lm_data)
        if self.entries_weight and ("aligned_spans", "entries") not in data:
            raise ConfigError(
                f"data: objective 'alm' has entries_weight {self.entries_weight:g}, and the "
                f"aligned_spans have no entries: give their step entries: true, or leave it out"
            )

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the loss of one batch."""
        from stages.student.losses.spans import span_likelihoods  # loads torch

        hidden_ND = step.hidden_states(batch)
        logprobs_N = step.logprobs_of(hidden_ND, batch["next_token_ids_N"])
        settings = self.model_dump(exclude={"loss"})
        return [step.over(hidden_ND, span_likelihoods(batch, logprobs_N, **settings))]
