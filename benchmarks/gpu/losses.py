"""The student's head with its loss, forward and backward, beside torch's and Liger's.

(N, D, V) = (8,192, 2,048, 151,936) in bfloat16. Ours is ``chunked_loss``: cross-entropy, and ``kd``
from a cached ``threshold`` table; plain and compiled torch make all logits and take cross-entropy
of them in float32. Each is checked on 2,048 positions of the same problem, then measured on all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bars import at_most
from benchmarks.gpu.head_loss import Candidate, Loss, Problem, Race, ours
from benchmarks.gpu.peers import liger_cross_entropy
from benchmarks.gpu.report import Report, Unavailable

PART = "losses"
FULL, QUICK = (8_192, 2_048, 151_936), (64, 32, 4_096)
OURS, KD = "ours, cross-entropy", "ours, kd from threshold"
LARGE_CHUNKS = 4 << 30
MOST_CROSS_ENTROPY, MOST_KD = 1.0, 1.1  # of Liger's time


def run(report: Report, *, quick: bool) -> None:
    """Measure all and compare."""
    problem = Problem.random(report.card, QUICK if quick else FULL, torch.bfloat16)
    race = Race(report, problem)
    liger = liger_cross_entropy()
    race.run(
        [
            ours(OURS, "cross_entropy"),
            ours(KD, "kd"),
            liger,
            ours(f"{OURS}, chunks of 4 GiB", "cross_entropy", chunk_bytes=LARGE_CHUNKS),
            Candidate("torch, cross-entropy", "cross_entropy", plain),
            Candidate("torch compiled, cross-entropy", "cross_entropy", compiled),
        ]
    )
    for name, most in ((OURS, MOST_CROSS_ENTROPY), (KD, MOST_KD)):
        ratio = race.ratio(name, liger.name)
        if ratio is None:
            report.note(f"{name} over {liger.name}: not both were measured, so there is no bar")
        elif report.card.is_gpu:
            report.bar(at_most(f"time of {name} over {liger.name}", ratio, most))


def plain(problem: Problem) -> Loss:
    """Return the loss as any trainer makes it."""
    return lambda: _cross_entropy(*_arguments(problem))


def compiled(problem: Problem) -> Loss:
    """Return the same, compiled for the problem's shape."""
    if not problem.hidden_ND.is_cuda:
        raise Unavailable("compiling for a CPU says nothing of a GPU")
    torch._dynamo.reset()
    function: Any = torch.compile(_cross_entropy, dynamic=False)
    return lambda: function(*_arguments(problem))


def _arguments(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.hidden_ND, problem.weight_VD, problem.next_token_ids_N


def _cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, next_token_ids_N: Tensor) -> Tensor:
    return functional.cross_entropy((hidden_ND @ weight_VD.T).float(), next_token_ids_N)
