"""Log-probs of many answers to one prompt, by one forward of the prompt; no gradient.

The prompt's keys and values are computed once and repeated for each answer, whose tokens alone are
fed after them. ``sequence_logprobs`` repeats the prompt itself, as a gradient needs it to; for 250
answers of three tokens to a prompt of 200 that is 50,000 tokens fed instead of 700.

Dimensions: N = answers, B = answers of a micro-batch, T = tokens, M = scored tokens, D = width.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.models.causal_lm.model import last_layer_of, student_head
from stages.models.causal_lm.sequence_logprobs import MICRO_BATCH_TOKENS, gathered_logprobs

Array = npt.NDArray[Any]


def shared_prompt_logprobs(
    model: PreTrainedModel,
    prompt_T: Array,
    answers: Sequence[Array],
    *,
    dtype: torch.dtype,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
) -> Tensor:
    """Return [N] sums of log p (nats) of each answer's tokens; call it in inference mode."""
    head, device = student_head(model), model.device
    hidden_BTD, cache = _run(model, prompt_T[None], None)
    first_N = torch.tensor([int(answer_T[0]) for answer_T in answers], device=device)
    last_1D, zeros_N = hidden_BTD[:, -1], torch.zeros_like(first_N)
    sums_N = gathered_logprobs(last_1D, head, zeros_N, first_N, dtype=dtype)
    for chosen in _micro_batches(answers, len(prompt_T), micro_batch_tokens):
        fed_BT = _padded([answers[n][:-1] for n in chosen])
        hidden_BTD, _ = _run(model, fed_BT, _repeated(cache, len(chosen)))
        pairs = [
            (b, at, int(token), n)
            for b, n in enumerate(chosen)
            for at, token in enumerate(answers[n][1:])  # each predicted by the one before it
        ]
        b_M, at_M, token_M, n_M = (
            torch.tensor(column, device=device) for column in zip(*pairs, strict=True)
        )
        own_M = torch.arange(len(pairs), device=device)
        logprobs_M = gathered_logprobs(hidden_BTD[b_M, at_M], head, own_M, token_M, dtype=dtype)
        sums_N = sums_N.index_add(0, n_M, logprobs_M)
    return sums_N


def _run(model: PreTrainedModel, ids_BT: Array, cache: Any) -> tuple[Tensor, Any]:
    """Return [B, T, D] what the head reads, and the keys and values up to here."""
    output: Any = model(
        input_ids=torch.from_numpy(ids_BT.astype(np.int64)).to(model.device),
        past_key_values=cache,
        output_hidden_states=[last_layer_of(model)],
        logits_to_keep=1,
        use_cache=True,
    )
    return output.hidden_states[-1], output.past_key_values


def _repeated(cache: Any, count: int) -> Any:
    """Return a prompt's keys and values once for each of ``count`` answers."""
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(count)
    return repeated


def _micro_batches(
    answers: Sequence[Array], prompt_length: int, micro_batch_tokens: int
) -> Iterator[list[int]]:
    """Yield answers with more than a first token, of like length; the prompt counts for each."""
    longer = [n for n in range(len(answers)) if len(answers[n]) > 1]
    longer.sort(key=lambda n: len(answers[n]))
    while longer:
        size = max(1, micro_batch_tokens // (prompt_length + len(answers[longer[-1]])))
        yield longer[-size:]
        longer = longer[:-size]


def _padded(rows: Sequence[Array]) -> Array:
    """Pad on the right, where no state that counts can see it."""
    ids_BT = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for b, ids_T in enumerate(rows):
        ids_BT[b, : len(ids_T)] = ids_T
    return ids_BT
