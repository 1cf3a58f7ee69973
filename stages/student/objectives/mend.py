"""MEND: a distiller learns vectors after which a frozen reader answers as after demonstrations.

MEND (arXiv 2403.06914), with p the teacher after its demonstrations and s the reader after the
distiller's vectors:

    L = answer_weight CE + kl_weight KL,    KL = mean over query positions of KL(p || s)
                                            CE = mean over answer tokens of -log s

Query positions are those of the query's and the answer's own tokens but the first (see
``schemas.tables.demonstrations``), over the whole step; answer tokens are among them. Stage 1 of
the paper, on documents, has ``answer_weight`` 0, stage 2, on episodes, 1; its lambda is
``kl_weight``, 1 in the published code. Gradients reach the distiller through the reader, which is
run, forward and backward, in every step: only the teacher's pass is cached.

Of an encoder-decoder the positions are those of the tokens that its decoder says: the answer's, or
the query's but the first where there is no answer.

The reader is the teacher itself, as in the paper, or with ``cross_model`` another model with its
tokenizer, which is a variant of ours. All values in nats.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.student.objectives.objective import Objective, Reads

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class MendConfig(Objective):
    """Cross-entropy of answers and forward KL at queries, both after the distiller's vectors.

    ``cross_model`` allows a reader that is not the cached teacher.
    """

    USES_READER: ClassVar[bool] = True

    loss: Literal["mend"] = "mend"
    answer_weight: float = Field(default=1.0, ge=0.0)
    kl_weight: float = Field(default=1.0, gt=0.0)
    cross_model: bool = False

    @property
    def reads(self) -> Reads:
        """What teacher and distiller read, and the teacher's distributions at the queries."""
        return Reads(data=("demonstrations", "teacher_logits"))

    def batches(self, data: "TrainingData") -> "Batches":
        """Return demonstrations and queries with the teacher's distributions."""
        from stages.student.batches.demonstrations import DemonstrationsCollator  # loads torch

        needs_answers = self.answer_weight > 0
        signals, frame = data.signals(), data.reader_frame
        return data.rows(DemonstrationsCollator(signals, needs_answers=needs_answers, frame=frame))

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the KL, and the answers' cross-entropy where it has a weight."""
        from stages.student.losses.cross_entropy import CrossEntropy  # both load torch
        from stages.student.losses.kl import Kd, teacher_of

        hidden_ND = step.read_states(batch)
        teacher = teacher_of(batch, step.teacher_head)
        kl = step.over(hidden_ND, Kd(batch["next_token_ids_N"], teacher, 1.0))
        terms = [replace(kl, weight=self.kl_weight)]
        if self.answer_weight:
            answers = batch["in_answer_N"]
            objective = CrossEntropy(batch["next_token_ids_N"][answers])
            hard = step.over(hidden_ND[answers], objective, "answer_tokens")
            sums = {"answer_cross_entropy": hard.sums["cross_entropy"]}
            terms.append(replace(hard, sums=sums, weight=self.answer_weight))
        return terms
