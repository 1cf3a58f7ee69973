"""In-context Learning Distillation: gold answers and the teacher's choice among candidates.

ICL-D (arXiv 2212.10670), with hard weight a(t) linear over the steps, from ``alpha_start`` at the
first to ``alpha_end`` at the last:

    L = a (hard_icl + b hard_lm) + (1 - a) (soft_icl + b soft_lm),    b = ``lm_weight``

``hard_icl`` is the cross-entropy of the gold candidate and ``soft_icl`` the cross-entropy to the
teacher's distribution, both over the episode's candidates: P(c) is the softmax of the candidates'
log-probs, per token (``candidate_score: mean``) or summed, which the paper leaves open. An episode
without candidates (generation) has a ``hard_icl``, the mean over its answer's tokens, and no soft
part. ``hard_lm`` is next-token cross-entropy on running text, ``soft_lm`` the cross-entropy to the
teacher's cached distribution over the vocabulary: the KL of ``kd`` plus the teacher's entropy.

ICL terms are means over the step's episodes, LM terms over its scored tokens of text (the paper's
are sums). Teacher and demonstrations are fixed by the cache: the paper redraws every epoch.

All values in nats.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from schemas.errors import ConfigError
from stages.student.objectives.objective import Objective, Reads

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class IclDistillationConfig(Objective):
    """Gold answers with weight alpha, the teacher's choice among candidates with the rest.

    Alpha goes in a line from ``alpha_start`` at the first step to ``alpha_end`` at the last; both 1
    is in-context tuning, which needs no teacher. ``lm_weight`` adds the same on running text.
    """

    loss: Literal["icl_distillation"] = "icl_distillation"
    lm_weight: float = Field(default=0.2, ge=0.0)
    alpha_start: float = Field(default=1.0, ge=0.0, le=1.0)
    alpha_end: float = Field(default=0.0, ge=0.0, le=1.0)
    candidate_score: Literal["mean", "sum"] = "mean"

    @property
    def needs_teacher(self) -> bool:
        """Whether some step looks at the teacher."""
        return min(self.alpha_start, self.alpha_end) < 1.0

    @property
    def reads(self) -> Reads:
        """Episodes and running text, each with what the teacher says of it if it is looked at."""
        scores = ("candidate_scores",) if self.needs_teacher else ()
        signals = ("teacher_logits",) if self.needs_teacher else ()
        text = ("documents", *signals) if self.lm_weight else ()
        return Reads(data=("episodes", *scores), lm_data=text)

    def lm_data_problem(self, num_tables: int) -> str:
        """Running text is needed where it has a weight."""
        if self.reads.lm_data and not num_tables:
            return (
                "objective 'icl_distillation' with lm_weight > 0 needs 'lm_data' (a documents "
                "table and its signals), got none: name it, or set lm_weight to 0"
            )
        return super().lm_data_problem(num_tables)

    def batches(self, data: "TrainingData") -> "Batches":
        """Return episodes, each with a row of running text if there is any."""
        from stages.student.batches.episodes import EpisodesWithText, IclCollator  # both load torch
        from stages.student.batches.training_data import Batches

        text = data.text(teacher=self.needs_teacher)
        rows = EpisodesWithText(data.dataset, data.lm_dataset, seed=data.seed)
        return Batches(rows, IclCollator(data.vocab_size, text))

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the ICL part, and the LM part where there is text."""
        from stages.student.losses.candidates import candidates_term  # loads torch

        alpha = self.alpha_start + (self.alpha_end - self.alpha_start) * step.progress
        # The one forward of DDP's wrapper is that of the text, where there is any.
        scores = step.answer_logprobs(batch["answers"], wrapped=not self.lm_weight)
        found = [
            candidates_term(
                batch, scores, alpha, self.candidate_score, with_teacher=self.needs_teacher
            )
        ]
        if self.lm_weight:
            found.append(self._text_term(batch["lm"], step, alpha))
        return found

    def _text_term(self, lm: dict[str, Any], step: "Step", alpha: float) -> "Term":
        """Average over tokens; without a teacher there is the hard loss alone."""
        from stages.student.losses.cross_entropy import CrossEntropy  # all load torch
        from stages.student.losses.kl import Kd, teacher_of
        from stages.student.losses.step import Term

        if not self.needs_teacher:
            term = step.over_positions(lm, CrossEntropy(lm["next_token_ids_N"]))
            hard = {"hard_lm": term.sums["cross_entropy"]}
            return Term(term.total, hard, "tokens", self.lm_weight)
        teacher = teacher_of(lm, step.lm_teacher_head)
        term = step.over_positions(lm, Kd(lm["next_token_ids_N"], teacher, 1.0 - alpha))
        entropy = lm["entropies_N"].sum()
        if bool(entropy.isnan()):
            raise ConfigError(
                "lm_data holds imported distributions, whose entropies nobody knows, and the loss "
                "'icl_distillation' adds them: capture them with the teacher, or set lm_weight to 0"
            )
        kl = term.sums["kl"]
        sums = {"hard_lm": term.sums["cross_entropy"], "soft_lm": kl + entropy, "kl_lm": kl}
        return Term(term.total + (1.0 - alpha) * entropy, sums, "tokens", self.lm_weight)
