"""The student's head and the loss in one pass, without the logits of more than one chunk.

For each chunk of scored positions: logits, log-softmax, the objective, and, while the softmax is
still there, its gradient with respect to the logits and from it those of hidden states and head.
So backward only multiplies by a number. Three matrix products a position are all there is, as in
an ordinary loss; what an ordinary loss adds is [N, V] logits and their gradient: 1.6 GB for 4,096
positions of a 49,152-token vocabulary in float32.

Matrix products run in ``dtype`` (bfloat16 or float32); softmax, loss and the sum of the head's
gradient over chunks are float32 (float64 if ``dtype`` is). The head is
``softcap * tanh(scale * (W h + b) / softcap)``, or without the capping ``scale * (W h + b)``.

Dimensions: N = scored positions, C = positions of one chunk, V = vocabulary, D = hidden width,
S = sums an objective reports.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Larger chunks spread the cost of adding [V, D] to the head's gradient once a chunk; on 2 cores
# (V 49,152, D 576) 64 MiB took 3.3 s of CPU for 1,020 positions, 256 MiB 2.9 s, all at once 3.1 s.
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 256 << 20, 1 << 30

_Inputs = tuple[Tensor, Tensor, Tensor | None]  # hidden_ND, weight_VD, bias_V


class PositionLoss(Protocol):
    """A loss as a function of the student's log-probs at some of the scored positions."""

    @property
    def SUMS(self) -> tuple[str, ...]:
        """What ``reduce_`` returns; the first is the loss itself."""

    @property
    def extra_blocks(self) -> int:
        """How many [C, V] float32 blocks ``reduce_`` makes beside the log-probs."""

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Return [S] sums over the positions ``rows``; ``logprobs_CV`` is overwritten.

        With ``with_grad`` it then holds the gradient of the first sum with respect to the logits.
        """


@dataclass(frozen=True, slots=True)
class StudentHead:
    """The head's own parameters, so that their gradients flow, and what follows the product."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return [C, V] logits as the model itself gives them (all rows of the head)."""
        return _cap(_affine(hidden_CD, self.weight_VD, self.bias_V, self.scale), self.softcap)


@dataclass(frozen=True, slots=True)
class LossSums:
    """``loss`` has a gradient; ``sums`` are plain numbers by the objective's names, on device."""

    loss: Tensor
    sums: Mapping[str, Tensor]


def chunked_loss(
    hidden_ND: Tensor,
    head: StudentHead,
    objective: PositionLoss,
    *,
    dtype: torch.dtype,
    chunk_bytes: int | None = None,
) -> LossSums:
    """Sum the objective over all N positions; divide by your own count of tokens.

    No chunk's [C, V] blocks take more than ``chunk_bytes`` together (one position at least).
    """
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if hidden_ND.device.type == "cpu" else GPU_CHUNK_BYTES
    with_grad = torch.is_grad_enabled()  # always off inside a Function
    job = _Job(objective, head.scale, head.softcap, dtype, chunk_bytes, with_grad)
    apply: Any = _ChunkedLoss.apply  # untyped in torch
    loss, sums_S = apply(hidden_ND, head.weight_VD, head.bias_V, job)
    return LossSums(loss, dict(zip(objective.SUMS, sums_S.unbind(), strict=True)))


def logits_loss(logits_NV: Tensor, objective: PositionLoss) -> LossSums:
    """Sum the objective over logits [N, V] that a model has made itself, as others' trainers do.

    Softmax and loss are float32 (float64 of float64 logits), a chunk at a time; what is held beside
    the logits is their gradient.
    """
    chunk_bytes = CPU_CHUNK_BYTES if logits_NV.device.type == "cpu" else GPU_CHUNK_BYTES
    with_grad = torch.is_grad_enabled()
    job = _Job(objective, 1.0, None, logits_NV.dtype, chunk_bytes, with_grad)
    apply: Any = _LogitsLoss.apply  # untyped in torch
    loss, sums_S = apply(logits_NV, job)
    return LossSums(loss, dict(zip(objective.SUMS, sums_S.unbind(), strict=True)))


@dataclass(frozen=True, slots=True)
class _Job:
    objective: PositionLoss
    scale: float
    softcap: float | None
    dtype: torch.dtype
    chunk_bytes: int
    with_grad: bool

    @property
    def wide(self) -> torch.dtype:
        """The dtype of softmax, loss and accumulated gradients."""
        return torch.promote_types(self.dtype, torch.float32)

    def chunks(self, num_positions: int, vocab_size: int) -> Iterator[slice]:
        """Cut the positions into equal chunks within the byte budget."""
        num_wide = 1 + self.objective.extra_blocks + (self.softcap is not None)
        blocks = self.wide.itemsize * num_wide + self.dtype.itemsize
        most = max(1, self.chunk_bytes // (vocab_size * blocks))
        num_chunks = -(-num_positions // most)
        size = -(-num_positions // max(num_chunks, 1))
        for start in range(0, num_positions, max(size, 1)):
            yield slice(start, min(start + size, num_positions))


def _affine(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float) -> Tensor:
    logits_CV = torch.nn.functional.linear(hidden_CD, weight_VD, bias_V)
    return logits_CV if scale == 1.0 else logits_CV * scale


def _cap(logits_CV: Tensor, softcap: float | None) -> Tensor:
    return logits_CV if softcap is None else torch.tanh(logits_CV / softcap) * softcap


class _Gradients:
    """Sums of the gradients over chunks, for those inputs that need one."""

    def __init__(self, job: _Job, inputs: _Inputs, needed: list[bool]) -> None:
        hidden_ND, weight_VD, bias_V = inputs
        self.hidden_ND = torch.empty_like(hidden_ND) if needed[0] else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=job.wide) if needed[1] else None
        self.bias_V = None
        if bias_V is not None and needed[2]:
            self.bias_V = torch.zeros_like(bias_V, dtype=job.wide)

    def __bool__(self) -> bool:
        return any(g is not None for g in (self.hidden_ND, self.weight_VD, self.bias_V))

    def add(self, rows: slice, grad_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
        """Add one chunk's share; ``grad_CV`` is the gradient of ``W h + b``, in float32."""
        if self.bias_V is not None:
            self.bias_V += grad_CV.sum(dim=0)
        narrow_CV = grad_CV.to(weight_VD.dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = narrow_CV @ weight_VD
        if self.weight_VD is not None and self.weight_VD.dtype == weight_VD.dtype:
            self.weight_VD.addmm_(narrow_CV.T, hidden_CD)
        elif self.weight_VD is not None:
            self.weight_VD += narrow_CV.T @ hidden_CD


class _ChunkedLoss(torch.autograd.Function):
    """Forward computes the gradients too; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden_ND, weight_VD, bias_V)
        needed = [job.with_grad and need for need in ctx.needs_input_grad]
        grads = _Gradients(job, inputs, needed)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums_S = _reduce_chunks(job, inputs, grads)
        ctx.grad_dtypes = tuple(None if tensor is None else tensor.dtype for tensor in inputs)
        ctx.save_for_backward(grads.hidden_ND, grads.weight_VD, grads.bias_V)
        ctx.mark_non_differentiable(sums_S)
        return sums_S[0].clone(), sums_S

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_outputs[0]
        grads = zip(ctx.saved_tensors, ctx.grad_dtypes, strict=True)
        scaled = [None if grad is None else _scaled(grad, factor, dtype) for grad, dtype in grads]
        return (*scaled, None)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``grad * factor``, rounded as it is written: a GPU makes no [V, D] in float32."""
    if grad.dtype == dtype:
        return grad * factor
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _reduce_chunks(job: _Job, inputs: _Inputs, grads: _Gradients) -> Tensor:
    """Return the [S] sums over all chunks and leave the gradients in ``grads``."""
    hidden_ND = inputs[0]
    weight_VD = inputs[1].to(job.dtype)
    bias_V = None if inputs[2] is None else inputs[2].to(job.dtype)
    sums_S = hidden_ND.new_zeros(len(job.objective.SUMS), dtype=job.wide)
    for rows in job.chunks(len(hidden_ND), len(weight_VD)):
        hidden_CD = hidden_ND[rows].to(job.dtype)
        logits_CV = _cap(_affine(hidden_CD, weight_VD, bias_V, job.scale), job.softcap)
        work_CV = torch.log_softmax(logits_CV, dim=-1, dtype=job.wide)
        slope_CV = None
        if grads and job.softcap is not None:
            slope_CV = 1 - (logits_CV.to(job.wide) / job.softcap) ** 2  # d tanh
        del logits_CV
        sums_S += job.objective.reduce_(work_CV, rows, with_grad=bool(grads))
        if grads:
            if slope_CV is not None:
                work_CV *= slope_CV
            if job.scale != 1.0:
                work_CV *= job.scale
            grads.add(rows, work_CV, hidden_CD, weight_VD)
        del work_CV, slope_CV  # before the next chunk makes its own
    return sums_S


class _LogitsLoss(torch.autograd.Function):
    """Forward computes the gradient too; backward scales it."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
        grad_NV = torch.empty_like(logits_NV) if job.with_grad else None
        sums_S = logits_NV.new_zeros(len(job.objective.SUMS), dtype=job.wide)
        with torch.autocast(logits_NV.device.type, enabled=False):
            for rows in job.chunks(*logits_NV.shape):
                work_CV = torch.log_softmax(logits_NV[rows], dim=-1, dtype=job.wide)
                sums_S += job.objective.reduce_(work_CV, rows, with_grad=job.with_grad)
                if grad_NV is not None:
                    grad_NV[rows] = work_CV
                del work_CV  # before the next chunk makes its own
        ctx.save_for_backward(grad_NV)
        ctx.mark_non_differentiable(sums_S)
        return sums_S[0].clone(), sums_S

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return (grad_NV * grad_outputs[0]).to(grad_NV.dtype), None
