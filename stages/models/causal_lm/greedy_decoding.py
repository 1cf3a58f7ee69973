"""Greedy decoding of several prompts at once, by transformers' ``generate``.

Prompts are padded on the left, with an attention mask, from which it counts positions; tests hold
it to one prompt at a time. A model that keeps a state is given prompts of equal lengths together,
unpadded (``kept_keys``). Nothing a model folder suggests for sampling or against repetition is
used: it would measure the suggestion.

Dimensions: B = prompts of a batch, T = tokens of the longest.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from stages.models.causal_lm.kept_keys import equally_long, keeps_keys, keeps_some_keys
from stages.models.causal_lm.language_head import max_positions


def decode_greedily(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray[Any, Any]],
    *,
    ends: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to and with the first of ``ends``.

    So one that ran out of tokens, or of the model's window, has no token of ``ends``. Call it in
    eval and inference mode.
    """
    lengths = [len(prompt) for prompt in prompts]
    if len(set(lengths)) > 1 and not keeps_keys(model):
        decoded: dict[int, list[int]] = {}
        for group in equally_long(range(len(prompts)), lengths):
            part = [prompts[index] for index in group]
            new = decode_greedily(model, part, ends=ends, max_new_tokens=max_new_tokens)
            decoded.update(zip(group, new, strict=True))
        return [decoded[index] for index in range(len(prompts))]
    input_ids_BT, mask_BT = _pad_on_the_left(prompts, model.device)
    room = max_positions(model.config.get_text_config())
    if room is not None:
        max_new_tokens = max(1, min(max_new_tokens, room - input_ids_BT.shape[1]))
    own = model.generation_config
    assert own is not None, "a causal model has a generation config"
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=keeps_some_keys(model),
    )
    model.generation_config = GenerationConfig()  # else its own values fill what we leave open
    try:
        output_BT: Any = model.generate(
            inputs=input_ids_BT, attention_mask=mask_BT, generation_config=settings
        )
    finally:
        model.generation_config = own
    return [_with_end(new, ends) for new in output_BT[:, input_ids_BT.shape[1] :].tolist()]


def _pad_on_the_left(
    prompts: Sequence[np.ndarray[Any, Any]], device: torch.device
) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    input_ids_BT = np.zeros((len(prompts), width), np.int64)
    mask_BT = np.zeros((len(prompts), width), np.int64)
    for b, prompt in enumerate(prompts):
        input_ids_BT[b, width - len(prompt) :] = prompt
        mask_BT[b, width - len(prompt) :] = 1
    return torch.from_numpy(input_ids_BT).to(device), torch.from_numpy(mask_BT).to(device)


def _with_end(new_ids: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(new_ids) if token in ends), len(new_ids))
    return new_ids[: stop + 1]
