"""Losses over an episode's candidate answers: the gold one, and the teacher's choice among them.

The ICL terms of In-context Learning Distillation (arXiv 2212.10670). P(c) is the softmax of the
candidates' log-probs, per token (``mean``) or summed, which the paper leaves open. An episode
without candidates (generation) has a hard loss, the mean over its answer's tokens, and no soft one.

Dimensions: N = candidates of an episode. All values in nats.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stages.student.losses.step import Term


class _Losses(NamedTuple):
    """One episode's losses; ``entropy`` is the teacher's, over the candidates."""

    hard: Tensor
    soft: Tensor
    entropy: Tensor


def candidates_term(
    batch: Mapping[str, Any],
    scores: Sequence[Tensor],
    alpha: float,
    kind: Literal["mean", "sum"],
    *,
    with_teacher: bool,
) -> Term:
    """Return ``alpha hard + (1 - alpha) soft`` over the episodes of a batch of ``IclCollator``.

    ``scores`` are the student's sums of log p of each episode's candidates [N].
    """
    teachers = batch.get("teacher_logprobs", [None] * len(scores))
    columns = zip(scores, batch["num_tokens"], batch["gold"], teachers, strict=True)
    losses = [_losses(*column, kind) for column in columns]
    hard, soft, entropy = (torch.stack(parts).sum() for parts in zip(*losses, strict=True))
    sums = {"hard_icl": hard.detach(), "alpha": hard.new_tensor(alpha * len(losses))}
    if with_teacher:
        sums |= {"soft_icl": soft.detach(), "kl_icl": soft.detach() - entropy}
    return Term(alpha * hard + (1.0 - alpha) * soft, sums, "samples")


def _losses(
    scores_N: Tensor,
    num_tokens_N: Tensor,
    gold: int,
    teacher_N: Tensor | None,
    kind: Literal["mean", "sum"],
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


def candidate_logprobs(
    scores_N: Tensor, num_tokens_N: Tensor, kind: Literal["mean", "sum"]
) -> Tensor:
    """Return log P(c) over the candidates from the sums of their log-probs."""
    return torch.log_softmax(scores_N / num_tokens_N if kind == "mean" else scores_N, dim=0)
