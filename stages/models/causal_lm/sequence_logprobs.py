"""Log-probs of answers after their prompts, with gradient: the student's half of every ICL loss.

``gathered_logprobs`` is the head: log-softmax at some (row, token) pairs, a chunk of rows at a
time, each chunk checkpointed, so backward makes its product again and no chunk's [C, V] blocks are
kept. ``continuation_logprobs`` is the whole student: many prompts, each with one or many answers.
``sequence_logprobs`` is the same for plain sequences whose last tokens count.

What costs a forward: the last token of an answer is fed to nobody, so all single-token answers of
a prompt share one row; equal sequences are fed once, and one that begins another rides on it (a
causal model sees the same). Answers of several tokens each repeat their prompt.

Rows are sorted by length, padded on the right without a mask (see ``batches.signals``) and cut into
micro-batches of like lengths. Where they are together too large for one, and a gradient is wanted,
all but the last are checkpointed: the last is differentiated first and freed before the others are
made again, so activations of one micro-batch live at a time.

Dimensions: M = scored tokens, R = hidden states that predict them, C = those of one chunk,
V = vocabulary, D = hidden width, B = rows of a micro-batch, T = tokens, N = answers.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from stages.models.causal_lm.chunked_loss import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES, StudentHead
from stages.models.causal_lm.model import final_hidden_states, last_layer_of, student_head

MICRO_BATCH_TOKENS = 8192  # of a forward, padding included
_SHORTEST = 0.75  # a row of a micro-batch, of its longest: at most a quarter is padding

I64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Continuations:
    """A prompt and N answers to it, end to end in ``token_ids_C`` as in the table ``episodes``."""

    prompt_T: npt.NDArray[Any]
    token_ids_C: npt.NDArray[Any]
    lengths_N: npt.NDArray[Any]

    def __post_init__(self) -> None:
        """Raise ValueError where some answer has no token, or none before it."""
        lengths_N = np.asarray(self.lengths_N, np.int64)
        if not len(self.prompt_T) or (lengths_N < 1).any():
            raise ValueError(
                f"a prompt of {len(self.prompt_T)} tokens with answers of {lengths_N.tolist()}: "
                f"each needs one at least"
            )
        assert int(lengths_N.sum()) == len(self.token_ids_C)

    @classmethod
    def of(cls, prompt_T: npt.NDArray[Any], answers: Sequence[npt.NDArray[Any]]) -> "Continuations":
        """Lay answers end to end; there is one at least."""
        return cls(prompt_T, np.concatenate(answers), np.array([len(a) for a in answers]))


def sequence_logprobs(
    model: nn.Module,
    sequences: Sequence[npt.NDArray[Any]],
    score_starts: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
) -> Tensor:
    """Return [len(sequences)] sums of log p (nats) of the tokens from ``score_starts`` on."""
    asked = [
        Continuations(ids_T[:start], ids_T[start:], np.array([len(ids_T) - start]))
        for ids_T, start in zip(sequences, score_starts, strict=True)
    ]
    return continuation_logprobs(model, asked, dtype=dtype, micro_batch_tokens=micro_batch_tokens)


def continuation_logprobs(
    model: nn.Module,
    asked: Sequence[Continuations],
    *,
    dtype: torch.dtype = torch.float32,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
) -> Tensor:
    """Return the sum of log p (nats, float32) of every answer, end to end in the order asked.

    ``model`` is a transformers model, or DDP around one: the wrapper then sees one forward, the
    last. ``dtype`` is that of the head's product. Has a gradient unless switched off outside.
    """
    bare = getattr(model, "module", model)
    assert isinstance(bare, PreTrainedModel)
    plan = _plan(asked)
    hidden_RD = _hidden_rows(model, bare, plan, micro_batch_tokens)
    rows_M, token_ids_M, answers_M = (
        torch.from_numpy(array).to(hidden_RD.device)
        for array in (plan.rows_M, plan.token_ids_M, plan.answers_M)
    )
    logprobs_M = gathered_logprobs(hidden_RD, student_head(bare), rows_M, token_ids_M, dtype=dtype)
    return logprobs_M.new_zeros(plan.num_answers).index_add(0, answers_M, logprobs_M)


def gathered_logprobs(
    hidden_RD: Tensor,
    head: StudentHead,
    rows_M: Tensor,
    token_ids_M: Tensor,
    *,
    dtype: torch.dtype,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return [M] log-softmax of the head's logits of ``hidden_RD[row]`` at a token, per pair.

    Products run in ``dtype``, the softmax in float32 (float64 if ``dtype`` is). No chunk's [C, V]
    blocks, with those of its backward, take more than ``chunk_bytes`` together (one row at least).
    """
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if hidden_RD.device.type == "cpu" else GPU_CHUNK_BYTES
    wide = torch.promote_types(dtype, torch.float32)
    num_narrow = 2 if head.softcap is None else 5  # logits and their gradient, through the tanh
    row_bytes = len(head.weight_VD) * (num_narrow * dtype.itemsize + 3 * wide.itemsize)
    size = max(1, chunk_bytes // row_bytes)
    order_M = torch.argsort(rows_M, stable=True)
    starts = torch.arange(0, max(len(hidden_RD), 1), size, device=rows_M.device)
    bounds = [*torch.searchsorted(rows_M[order_M], starts).tolist(), len(rows_M)]
    parts = []
    for start, (first, stop) in zip(starts.tolist(), pairwise(bounds), strict=True):
        pairs = order_M[first:stop]
        hidden_CD, rows = hidden_RD[start : start + size], rows_M[pairs] - start
        arguments = (hidden_CD, head, rows, token_ids_M[pairs], dtype)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_dense_logprobs, *arguments, use_reentrant=False))
        else:
            parts.append(_dense_logprobs(*arguments))
    return torch.cat(parts)[torch.argsort(order_M)]


def _dense_logprobs(
    hidden_CD: Tensor, head: StudentHead, rows: Tensor, token_ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """One chunk, all [C, V] at once; weights are cast here so that chunks add up in float32."""
    with torch.autocast(hidden_CD.device.type, enabled=False):
        bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
        cast = StudentHead(head.weight_VD.to(dtype), bias_V, head.scale, head.softcap)
        logits_CV = cast.logits(hidden_CD.to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        return torch.log_softmax(logits_CV, dim=-1, dtype=wide)[rows, token_ids]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Sequences to feed, shortest first, and for each scored token the row that predicts it."""

    fed: list[I64Array]
    fed_R: I64Array  # which sequence a row lies in, rising
    positions_R: I64Array  # and where in it
    rows_M: I64Array
    token_ids_M: I64Array
    answers_M: I64Array  # which answer a scored token belongs to
    num_answers: int


def _plan(asked: Sequence[Continuations]) -> _Plan:
    fed, lengths, columns, num_answers = [], [], [], 0
    for item in asked:
        for ids_T, positions, token_ids, answers in _feeds(item):
            fed.append(ids_T)
            lengths.append(len(positions))
            columns.append(np.stack([positions, token_ids, answers + num_answers]))
        num_answers += len(item.lengths_N)
    positions_M, token_ids_M, answers_M = np.concatenate(columns, axis=1)
    kept, place = _share(fed)
    stride = 1 + max(map(len, fed))
    keys_M = np.repeat(place, lengths) * stride + positions_M
    keys_R, rows_M = np.unique(keys_M, return_inverse=True)
    return _Plan(
        fed=[fed[index] for index in kept],
        fed_R=keys_R // stride,
        positions_R=keys_R % stride,
        rows_M=rows_M.reshape(-1).astype(np.int64),
        token_ids_M=token_ids_M,
        answers_M=answers_M,
        num_answers=num_answers,
    )


def _feeds(item: Continuations) -> Iterator[tuple[I64Array, I64Array, I64Array, I64Array]]:
    """Yield what is fed, the positions that predict, what they predict, and for which answer.

    The token at index t is predicted at t - 1; answers of one token need the prompt alone.
    """
    prompt_T = item.prompt_T.astype(np.int64)
    token_ids_C, lengths_N = item.token_ids_C.astype(np.int64), item.lengths_N.astype(np.int64)
    ends_N = np.cumsum(lengths_N)
    last = len(prompt_T) - 1
    single = np.flatnonzero(lengths_N == 1)
    if len(single):
        yield prompt_T, np.full(len(single), last), token_ids_C[ends_N[single] - 1], single
    for n in np.flatnonzero(lengths_N > 1):
        answer = token_ids_C[ends_N[n] - lengths_N[n] : ends_N[n]]
        positions = last + np.arange(len(answer))
        yield np.concatenate([prompt_T, answer[:-1]]), positions, answer, np.full(len(answer), n)


def _share(fed: Sequence[I64Array]) -> tuple[list[int], I64Array]:
    """Return which sequences are needed, shortest first, and in which of those each one lies."""
    keys = [ids_T.astype(np.int32).tobytes() for ids_T in fed]
    order = sorted(range(len(fed)), key=keys.__getitem__)
    hosts = list(range(len(fed)))
    for here, following in reversed(list(pairwise(order))):  # what begins with a key follows it
        if keys[following].startswith(keys[here]):
            hosts[here] = hosts[following]
    kept = sorted(set(hosts), key=lambda index: len(fed[index]))
    place_of = {index: place for place, index in enumerate(kept)}
    return kept, np.array([place_of[host] for host in hosts], np.int64)


def _hidden_rows(
    model: nn.Module, bare: PreTrainedModel, plan: _Plan, micro_batch_tokens: int
) -> Tensor:
    """Return [R, D] hidden states; ``model`` runs the last micro-batch, ``bare`` the others."""
    lengths = [len(ids_T) for ids_T in plan.fed]
    runs = _runs(lengths, micro_batch_tokens)
    together = sum((run.stop - run.start) * lengths[run.stop - 1] for run in runs)
    keep_all = together <= micro_batch_tokens or not torch.is_grad_enabled()
    last_layer = last_layer_of(bare)
    parts = []
    for run in runs:
        first, stop = np.searchsorted(plan.fed_R, [run.start, run.stop])
        ids_BT = _padded(plan.fed[run])
        flat = (plan.fed_R[first:stop] - run.start) * ids_BT.shape[1] + plan.positions_R[first:stop]
        ids, at = (torch.from_numpy(array).to(bare.device) for array in (ids_BT, flat))
        if run is runs[-1]:
            parts.append(_forward(model, ids, at, last_layer))
        elif keep_all:
            parts.append(_forward(bare, ids, at, last_layer))
        else:
            parts.append(checkpoint(_forward, bare, ids, at, last_layer, use_reentrant=False))
    return torch.cat(parts)


def _forward(model: nn.Module, ids_BT: Tensor, flat: Tensor, last_layer: int) -> Tensor:
    hidden_BTD = final_hidden_states(model, ids_BT, last_layer=last_layer)
    return hidden_BTD.flatten(0, 1).index_select(0, flat)


def _runs(lengths: Sequence[int], micro_batch_tokens: int) -> list[slice]:
    """Cut rising lengths into runs of at most that many padded tokens (one row at least).

    No row is shorter than ``_SHORTEST`` of its run's longest.
    """
    runs: list[slice] = []
    stop = len(lengths)
    while stop:
        longest = lengths[stop - 1]
        start = max(0, stop - max(1, micro_batch_tokens // longest))
        start = bisect_left(lengths, _SHORTEST * longest, lo=start, hi=stop)
        runs.append(slice(start, stop))
        stop = start
    return runs[::-1]


def _padded(rows: Sequence[I64Array]) -> I64Array:
    ids_BT = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, ids_T in zip(ids_BT, rows, strict=True):
        row[: len(ids_T)] = ids_T
    return ids_BT
