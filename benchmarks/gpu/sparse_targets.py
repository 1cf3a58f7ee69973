"""The loss of sparse targets beside the nearest kernels of others, at two numbers of positions.

All are the KL to the same 16 weighted tokens a position, (D, V) = (2,048, 151,936), bfloat16,
forward and backward. VeOmni's takes log-probs of K tokens; Liger's takes dense probabilities, which
are made beforehand, outside its time and within its memory; plain torch makes all logits.
"""

import torch
from torch import Tensor

from benchmarks.gpu.head_loss import Candidate, Loss, Problem, Race, ours
from benchmarks.gpu.peers import liger_dense_kl, veomni_top_k
from benchmarks.gpu.report import Report

PART = "sparse targets"
FULL, QUICK = ((8_192, 32_768), 2_048, 151_936), ((48, 96), 32, 4_096)
OURS = "ours, KL from threshold"


def run(report: Report, *, quick: bool) -> None:
    """Measure all at each number of positions."""
    counts, width, vocab_size = QUICK if quick else FULL
    for count in counts:
        shape = (count, width, vocab_size)
        report.attempt(f"{count:,} positions", lambda shape=shape: _at(report, shape))  # type: ignore[misc]


def _at(report: Report, shape: tuple[int, int, int]) -> None:
    race = Race(report, Problem.random(report.card, shape, torch.bfloat16))
    peers = [veomni_top_k(), liger_dense_kl(), Candidate("torch, gathered", "kl", plain)]
    race.run([ours(OURS, "kl"), *peers])
    for peer in peers:
        if (ratio := race.ratio(peer.name, OURS)) is not None:
            report.row(what=f"{peer.name} over ours", positions=shape[0], times=ratio)


def plain(problem: Problem) -> Loss:
    """Return the loss with all log-probs made, as transformers' users write it."""

    def forward() -> Tensor:
        logits_NV = (problem.hidden_ND @ problem.weight_VD.T).float()
        kept_NK = logits_NV.log_softmax(-1).gather(1, problem.token_ids_NK)
        kl: Tensor = -(problem.weights_NK * kept_NK).sum(1).mean() - problem.entropies_N.mean()
        return kl

    return forward
