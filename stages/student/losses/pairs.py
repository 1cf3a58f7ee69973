"""Losses of preference pairs: NLL and KL of one side of each, and DPO's of both.

DCKD (arXiv 2502.17927) and DPO (arXiv 2305.18290, equation 7). ``weights_N`` of a batch make sums
over positions sums over samples of means over tokens.

Dimensions: N = scored positions, those of chosen responses first, B = pairs. All values in nats.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.student.losses.cross_entropy import CrossEntropy
from stages.student.losses.kl import Kd, teacher_of
from stages.student.losses.step import Step, Term

_PER_POSITION = ("_N", "_NK", "_ND")


def side_term(
    step: Step,
    batch: dict[str, Any],
    rows: slice,
    hidden_ND: Tensor,
    side: str,
    nll_weight: float,
    kl_weight: float,
) -> Term:
    """Return ``nll_weight NLL + kl_weight KL`` of one side, with both in the log."""
    part = {name: value[rows] for name, value in batch.items() if name.endswith(_PER_POSITION)}
    teacher = teacher_of(part, step.teacher_head)
    total = nll_weight + kl_weight
    share = kl_weight / total if total else 1.0
    objective = Kd(part["next_token_ids_N"], teacher, share, part["weights_N"])
    term = step.over(hidden_ND[rows], objective, "samples")
    sums = {f"{name}_{side}": value for name, value in term.sums.items()}
    return Term(term.total, sums, "samples", total)


def nll_of_chosen(batch: dict[str, Any], hidden_ND: Tensor, step: Step, weight: float) -> Term:
    """Return ``weight`` times the mean over pairs of a chosen response's cross-entropy a token."""
    rows = slice(0, batch["num_chosen"])
    objective = CrossEntropy(batch["next_token_ids_N"][rows], batch["weights_N"][rows])
    term = step.over(hidden_ND[rows], objective, "samples")
    return Term(term.total, {"cross_entropy_chosen": term.sums["cross_entropy"]}, "samples", weight)


def dpo_term(logprobs: Sequence[Tensor], reference_B2: Tensor, *, beta: float) -> Term:
    """Return DPO's loss; ``logprobs`` are the student's sums [2] of each pair, chosen first.

    Rewards are beta times log-ratios.
    """
    rewards_B2 = beta * (torch.stack(list(logprobs)) - reference_B2)
    margins_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    loss = -functional.logsigmoid(margins_B).sum()
    known_B = margins_B.detach()
    sums = {"reward_margin": known_B.sum(), "reward_accuracy": (known_B > 0).to(known_B).sum()}
    return Term(loss, sums, "samples")
