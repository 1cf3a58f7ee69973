"""On-policy distillation from a cache: a student's own responses, scored once by the teacher.

At each token y that the student sampled, with p the teacher, s the student as it is now and q the
student that wrote the responses (``losses.opd``):

    -min(r A, clip(r, 1 - clip, 1 + clip) A),  A = log p(y) - log s(y),  r = s(y) / q(y)

A is held constant; the loss is a mean over the step's tokens. Lightning OPD (arXiv 2604.13010,
equations 2 and 4, algorithm 1) has this A, responses that are written once by the SFT student, and
no r: ``importance: none``. Its bound on A is ``max_advantage``. We differ in r by default, which is
PPO's (arXiv 1707.06347): with it the gradient stays that of KL(s || p) at the writer's prefixes as
the student moves, and a token that has moved by ``clip`` in its A's direction is left alone.

The paper asks that the teacher be the one whose answers the SFT student learnt. A cache cannot see
that; what it can tell is that the two tables are of two models and of the same responses.
All values in nats.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from schemas.errors import ConfigError
from stages.models.spec import is_one_model
from stages.stage import TableRef
from stages.student.objectives.objective import Objective, Reads, TableKind

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term

SCORES, SUMS = "response_token_logprobs", "response_logprobs"


class OpdConfig(Objective):
    """The clipped surrogate of KL(student || teacher) at tokens that the student sampled.

    ``max_staleness`` is how far, in nats a token, the student may go from the one that wrote the
    responses: training ends in an error beyond it, and asks for another round.
    """

    SHARDS: ClassVar[bool] = True

    loss: Literal["opd"] = "opd"
    importance: Literal["clipped", "none"] = "clipped"
    clip: float = Field(default=0.2, gt=0.0)
    max_advantage: float | None = Field(default=None, gt=0.0)
    max_staleness: float = Field(default=0.2, gt=0.0)

    @property
    def reads(self) -> Reads:
        """The responses, with their writer's log-probs, and the teacher's."""
        return Reads(data=("responses", SCORES))

    def require(self, data: Sequence[TableKind], lm_data: Sequence[TableKind]) -> None:
        """Say of sums of log-probs what makes log-probs of tokens."""
        found = {table for table, _ in data}
        if SUMS in found and SCORES not in found:
            raise ConfigError(
                f"data: objective 'opd' needs the teacher's log-prob of each token, and {SUMS} "
                f"has one of each response: set per_token to true in the step that makes it"
            )
        super().require(data, lm_data)

    def check(self, tables: Sequence[TableRef]) -> None:
        """Refuse scores of other responses, or by the model that wrote them."""
        by_table = {ref.table.name: ref for ref in tables}
        responses, scores = by_table["responses"], by_table[SCORES]
        if scores.inputs and responses.fingerprint not in scores.inputs:
            raise ConfigError(
                f"data: step '{scores.step}' scores other responses than those of step "
                f"'{responses.step}': name the table that it was made of"
            )
        writer, teacher = responses.made_by, scores.made_by
        if writer is not None and teacher is not None and is_one_model(writer, teacher):
            raise ConfigError(
                f"data: '{responses.step}' was written and '{scores.step}' scored by one model, so "
                f"there is nothing to learn: score the responses with the teacher"
            )

    def check_logged(self, means: Mapping[str, float], step: int) -> None:
        """Refuse to train on where the responses have become another model's."""
        staleness = means["staleness"]
        if not staleness <= self.max_staleness:
            raise ConfigError(
                f"at step {step} the student is {staleness:.3g} nats a token from the one that "
                f"wrote the responses, max_staleness is {self.max_staleness:g}: take fewer steps "
                f"or a lower lr and more 'rounds', so that it answers anew, or raise the bound"
            )

    def batches(self, data: "TrainingData") -> "Batches":
        """Return the responses with both models' log-probs of their tokens."""
        from stages.student.batches.responses import OpdCollator  # loads torch

        return data.rows(OpdCollator.of(data.dataset, data.vocab_size))

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the surrogate over the tokens of all responses."""
        from stages.student.losses.opd import OnPolicyDistillation  # loads torch

        surrogate = OnPolicyDistillation(
            batch["next_token_ids_N"],
            batch["teacher_logprobs_N"],
            batch["writer_logprobs_N"],
            self.clip if self.importance == "clipped" else None,
            self.max_advantage,
        )
        return [step.over_positions(batch, surrogate)]
