"""DCKD: imitate the aligned teacher on chosen and on rejected responses, and learn the chosen ones.

DCKD (arXiv 2502.17927, first stage of ADPA), with p the teacher and s the student:

    sft_weight NLL(chosen) + alpha [chosen_weight KL(p || s | chosen)
                                    + rejected_weight KL(p || s | rejected)]

Each part is a mean over a response's tokens, then over the step's pairs: the published code's mean
over a micro-batch of one pair. The end-of-turn token of a finished response is a position like any
other (the code leaves it out). We differ from the code in its KL over the teacher's 50 likeliest
tokens and one bucket, in half precision: here the encoding of the cache decides (see ``kd``;
``top_k`` with k = 50 is that bucket, without the code's clamp to [1e-8, 1 - 1e-8]).

Dimensions: N = scored positions, those of chosen responses first. All values in nats.
"""

from typing import Any

from torch import Tensor

from stages.student.objectives.cross_entropy import CrossEntropy
from stages.student.objectives.kd import Kd, teacher_of
from stages.student.step import Step, Term
from stages.student.train_config import DckdConfig


def terms(config: DckdConfig, batch: dict[str, Any], step: Step) -> list[Term]:
    """Return the losses of a batch of ``DckdCollator``."""
    hidden_ND = step.hidden_states(batch)
    num_chosen = batch["num_chosen"]
    chosen, rejected = slice(0, num_chosen), slice(num_chosen, len(hidden_ND))
    kl_weights = config.alpha * config.chosen_weight, config.alpha * config.rejected_weight
    return [
        _term(step, batch, chosen, hidden_ND, "chosen", config.sft_weight, kl_weights[0]),
        _term(step, batch, rejected, hidden_ND, "rejected", 0.0, kl_weights[1]),
    ]


def _term(
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


_PER_POSITION = ("_N", "_NK", "_ND")


def nll_of_chosen(batch: dict[str, Any], hidden_ND: Tensor, step: Step, weight: float) -> Term:
    """Return ``weight`` times the mean over pairs of a chosen response's cross-entropy a token."""
    rows = slice(0, batch["num_chosen"])
    objective = CrossEntropy(batch["next_token_ids_N"][rows], batch["weights_N"][rows])
    term = step.over(hidden_ND[rows], objective, "samples")
    return Term(term.total, {"cross_entropy_chosen": term.sums["cross_entropy"]}, "samples", weight)
