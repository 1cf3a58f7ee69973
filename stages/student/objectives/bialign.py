"""BiAlign: align the student's predictions and its preferences among demonstration subsets.

BiAlign (arXiv 2312.17055), ``L = L_KL + rank_weight * L_rank``: the forward KL at every position of
the whole few-shot sequence (demonstrations, query and answer; see ``kd`` for the encodings), and
the ranking loss of ``ranking`` over the student's log Q of the cached subsets, made again with
gradient at every step: N more forwards a sample.

The paper writes both as sums over samples; here both are means over the step, and the KL over its
positions too, so that ``rank_weight`` 1 means the same at every length. ``kl_reduction: sum`` is
the paper's: positions are summed, and only samples averaged (in the log too).

Dimensions: N = subsets of a sample. All values in nats.
"""

from dataclasses import replace
from typing import Any

import torch

from stages.student.objectives.kd import Kd, teacher_of
from stages.student.ranking import ranking_loss
from stages.student.step import Step, Term
from stages.student.train_config import BiAlignConfig


def terms(config: BiAlignConfig, batch: dict[str, Any], step: Step) -> list[Term]:
    """Return the KL and the ranking loss of a batch of ``BiAlignCollator``."""
    teacher = teacher_of(batch, step.teacher_head)
    kl = step.over_positions(batch, Kd(batch["next_token_ids_N"], teacher, 1.0))
    if config.kl_reduction == "sum":
        kl = replace(kl, unit="samples")
    ranks = batch["ranks"]
    student: Any = torch.cat(step.answer_logprobs(batch["subsets"]))
    losses = [
        ranking_loss(student_N, ranks_N, detach_range=config.detach_range)
        for student_N, ranks_N in zip(student.split([len(r) for r in ranks]), ranks, strict=True)
    ]
    total = torch.stack(losses).sum()
    return [kl, Term(total, {"rank": total.detach()}, "samples", config.rank_weight)]
