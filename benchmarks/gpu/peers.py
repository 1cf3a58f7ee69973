"""Other projects' heads and losses, as candidates where they install: Liger and VeOmni.

Both are called as their own documentation calls them, on the arguments of a ``Problem``. What is
not there, or cannot run on this device, is ``Unavailable`` with the reason.

Dimensions: N = scored positions, V = vocabulary, K = kept entries.
"""

import contextlib
import importlib
import io
from types import ModuleType

from torch import Tensor

from benchmarks.gpu.head_loss import Candidate, Loss, Problem
from benchmarks.gpu.report import Unavailable, one_line

LIGER, VEOMNI = "liger-kernel", "veomni"
_LIGER = "liger_kernel.transformers.fused_linear_"
_VEOMNI = "veomni.ops.kernels.cross_entropy.chunk_topk_distill"


def liger_cross_entropy() -> Candidate:
    """Return Liger's head fused with cross-entropy."""

    def prepare(problem: Problem) -> Loss:
        module = _module(f"{_LIGER}cross_entropy", LIGER)
        _require_gpu(problem, LIGER)
        loss = module.LigerFusedLinearCrossEntropyLoss()
        arguments = (problem.weight_VD, problem.hidden_ND, problem.next_token_ids_N)
        return lambda: loss(*arguments)

    return Candidate("Liger, cross-entropy", "cross_entropy", prepare)


def liger_dense_kl() -> Candidate:
    """Return Liger's head fused with the KL to dense probabilities, which are made beforehand."""

    def prepare(problem: Problem) -> Loss:
        module = _module(f"{_LIGER}kl_div", LIGER)
        _require_gpu(problem, LIGER)
        loss = module.LigerFusedLinearKLDivLoss(reduction="batchmean")
        arguments = (problem.hidden_ND, problem.weight_VD, dense_targets(problem))
        return lambda: loss(*arguments)

    return Candidate("Liger, KL to dense targets", "kl", prepare)


def dense_targets(problem: Problem) -> Tensor:
    """Return the weights as [N, V] of the problem's dtype."""
    shape = (len(problem.hidden_ND), len(problem.weight_VD))
    dense_NV = problem.hidden_ND.detach().new_zeros(shape)
    weights_NK = problem.weights_NK.to(dense_NV.dtype)
    return dense_NV.scatter_(1, problem.token_ids_NK, weights_NK)


def veomni_top_k() -> Candidate:
    """Return VeOmni's chunked top-k distillation: of its outputs the loss alone is used."""

    def prepare(problem: Problem) -> Loss:
        module = _module(_VEOMNI, VEOMNI)
        logprobs_NK = problem.weights_NK.log()

        def forward() -> Tensor:
            outputs = module.chunk_topk_distill_function(
                problem.hidden_ND[None],
                problem.weight_VD,
                problem.next_token_ids_N[None],
                problem.token_ids_NK[None],
                logprobs_NK[None],
                shift_labels=problem.next_token_ids_N[None],
            )
            kl: Tensor = outputs[2].mean()
            return kl

        return forward

    return Candidate("VeOmni, chunked top-k", "kl", prepare)


def _module(name: str, package: str) -> ModuleType:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # one of them greets
            return importlib.import_module(name)
    except Exception as error:  # a package that is half there raises anything
        advice = f"`pip install --no-deps {package}` and what it then asks for"
        raise Unavailable(f"it does not import: {one_line(error)} ({advice})") from error


def _require_gpu(problem: Problem, package: str) -> None:
    if not problem.hidden_ND.is_cuda:
        raise Unavailable(f"the kernels of {package} run on a GPU alone")
