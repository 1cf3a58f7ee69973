"""BiAlign: align the student's predictions and its preferences among demonstration subsets.

BiAlign (arXiv 2312.17055), ``L = L_KL + rank_weight * L_rank``: the forward KL at every position of
the whole few-shot sequence (demonstrations, query and answer; see ``losses.kl`` for the encodings),
and the ranking loss of ``losses.ranking`` over the student's log Q of the cached subsets, made
again with gradient at every step: N more forwards a sample.

The paper writes both as sums over samples, the KL over their positions too; here both are means
over the step's samples (in the log too). ``kl_reduction: mean`` averages the KL over positions as
well, so that it reads like another loss's: but then the ranking loss, whose slope is one over the
student's range of log Q, weighs as many times more as a sample has positions, and drives the KL
out. ``rank_weight`` is 0.05 where the paper has 1: with the paper's the student answered fewer
episodes, with this one as many as without the ranking loss (docs/methods/evidence_icl.md).

Dimensions: N = subsets of a sample. All values in nats.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.student.objectives.objective import Objective, Reads

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class BiAlignConfig(Objective):
    """Forward KL on whole few-shot sequences plus ``rank_weight`` times the ranking loss.

    ``detach_range`` keeps the ranking loss's denominator out of the gradient. ``kl_reduction`` is
    the sum over each sample's tokens, averaged over samples, or the mean over all tokens.
    """

    loss: Literal["bialign"] = "bialign"
    rank_weight: float = Field(default=0.05, gt=0.0)
    detach_range: bool = True
    kl_reduction: Literal["sum", "mean"] = "sum"

    @property
    def reads(self) -> Reads:
        """Episodes, the teacher's distributions on them and its order of the subsets."""
        return Reads(data=("episodes", "teacher_logits", "subset_preferences"))

    def batches(self, data: "TrainingData") -> "Batches":
        """Return whole episodes with their subsets and ranks."""
        from stages.student.batches.episodes import BiAlignCollator  # loads torch

        return data.rows(BiAlignCollator(data.signals()))

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the KL and the ranking loss."""
        from stages.student.losses.kl import Kd, teacher_of  # both load torch
        from stages.student.losses.ranking import ranking_term

        teacher = teacher_of(batch, step.teacher_head)
        kl = step.over_positions(batch, Kd(batch["next_token_ids_N"], teacher, 1.0))
        if self.kl_reduction == "sum":
            kl = replace(kl, unit="samples")
        ranking = ranking_term(
            step.answer_logprobs(batch["subsets"]), batch["ranks"], detach_range=self.detach_range
        )
        return [kl, replace(ranking, weight=self.rank_weight)]
