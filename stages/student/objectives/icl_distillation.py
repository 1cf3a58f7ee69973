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

Dimensions: N = candidates of an episode. All values in nats.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.student.objectives.cross_entropy import CrossEntropy
from stages.student.objectives.kd import Kd, teacher_of
from stages.student.step import Step, Term
from stages.student.train_config import CandidateScore, IclDistillationConfig


def terms(config: IclDistillationConfig, batch: dict[str, Any], step: Step) -> list[Term]:
    """Return the ICL and the LM part of a batch of ``IclCollator``."""
    alpha = config.alpha_start + (config.alpha_end - config.alpha_start) * step.progress
    found = [_icl_term(config, batch, step, alpha)]
    if config.lm_weight:
        found.append(_lm_term(config, batch["lm"], step, alpha))
    return found


class _Losses(NamedTuple):
    """One episode's losses; ``entropy`` is the teacher's, over the candidates."""

    hard: Tensor
    soft: Tensor
    entropy: Tensor


def _icl_term(
    config: IclDistillationConfig, batch: dict[str, Any], step: Step, alpha: float
) -> Term:
    """Average over episodes; the one forward of DDP's wrapper where there is no text."""
    scores = step.answer_logprobs(batch["answers"], wrapped=not config.lm_weight)
    teachers = batch.get("teacher_logprobs", [None] * len(scores))
    columns = zip(scores, batch["num_tokens"], batch["gold"], teachers, strict=True)
    losses = [_losses(*column, config.candidate_score) for column in columns]
    hard, soft, entropy = (torch.stack(parts).sum() for parts in zip(*losses, strict=True))
    sums = {"hard_icl": hard.detach(), "alpha": hard.new_tensor(alpha * len(losses))}
    if config.needs_teacher:
        sums |= {"soft_icl": soft.detach(), "kl_icl": soft.detach() - entropy}
    return Term(alpha * hard + (1.0 - alpha) * soft, sums, "samples")


def _losses(
    scores_N: Tensor,
    num_tokens_N: Tensor,
    gold: int,
    teacher_N: Tensor | None,
    kind: CandidateScore,
) -> _Losses:
    nothing = scores_N.new_zeros(())
    if gold < 0:
        return _Losses(-(scores_N / num_tokens_N).sum(), nothing, nothing)
    logprobs_N = candidate_logprobs(scores_N, num_tokens_N, kind)
    if teacher_N is None:
        return _Losses(-logprobs_N[gold], nothing, nothing)
    target_N = candidate_logprobs(teacher_N, num_tokens_N, kind)
    soft, entropy = (-(target_N.exp() * values_N).sum() for values_N in (logprobs_N, target_N))
    return _Losses(-logprobs_N[gold], soft, entropy)


def candidate_logprobs(scores_N: Tensor, num_tokens_N: Tensor, kind: CandidateScore) -> Tensor:
    """Return log P(c) over the candidates from the sums of their log-probs."""
    return torch.log_softmax(scores_N / num_tokens_N if kind == "mean" else scores_N, dim=0)


def _lm_term(config: IclDistillationConfig, lm: dict[str, Any], step: Step, alpha: float) -> Term:
    """Average over tokens; without a teacher there is the hard loss alone."""
    if not config.needs_teacher:
        term = step.over_positions(lm, CrossEntropy(lm["next_token_ids_N"]))
        return Term(term.total, {"hard_lm": term.sums["cross_entropy"]}, "tokens", config.lm_weight)
    teacher = teacher_of(lm, step.lm_teacher_head)
    term = step.over_positions(lm, Kd(lm["next_token_ids_N"], teacher, 1.0 - alpha))
    entropy = lm["entropies_N"].sum()
    kl = term.sums["kl"]
    sums = {"hard_lm": term.sums["cross_entropy"], "soft_lm": kl + entropy, "kl_lm": kl}
    return Term(term.total + (1.0 - alpha) * entropy, sums, "tokens", config.lm_weight)
