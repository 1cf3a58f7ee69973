"""Free answers: what a student writes after each prompt, beside the answer of the data.

Greedy decoding by transformers' ``generate`` on prompts padded on the left, with an attention mask,
from which it counts positions; tests hold it to one prompt at a time. Nothing a model folder
suggests for sampling or against repetition is used: it would measure the suggestion.

An answer is the first line of what comes after the prompt, white space around it and special
tokens taken away; the answer of the data is cut the same way. Decoding stops at the end of text or
``SPARE_TOKENS`` after the longest answer of its batch, so a student that rambles is not cut to fit.

Dimensions: B = rows of a batch, T = tokens of the longest prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from schemas.errors import ConfigError

SPARE_TOKENS = 8

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FreeAnswer:
    """One episode's answer in the data, and the student's."""

    gold: str
    predicted: str


def generate_answers(
    model: PreTrainedModel, rows: Sequence[Row], *, tokenizer_folder: Path, batch_size: int
) -> list[FreeAnswer]:
    """Decode an answer for each ``episodes`` row, in order; call it in eval and inference mode."""
    tokenizer = _load_tokenizer(tokenizer_folder)
    ends = _end_tokens(model, tokenizer)
    answers: list[FreeAnswer | None] = [None] * len(rows)
    longest_first = sorted(range(len(rows)), key=lambda i: -int(rows[i]["answer_start"]))
    for start in range(0, len(rows), batch_size):
        chosen = longest_first[start : start + batch_size]
        batch = [rows[i] for i in chosen]
        decoded = _decode_greedily(model, batch, ends)
        for i, row, new_ids in zip(chosen, batch, decoded, strict=True):
            gold_ids = row["input_ids_T"][row["answer_start"] :].tolist()
            answers[i] = FreeAnswer(
                gold=_first_line(tokenizer.decode(gold_ids, skip_special_tokens=True)),
                predicted=_first_line(tokenizer.decode(new_ids, skip_special_tokens=True)),
            )
    return [answer for answer in answers if answer is not None]


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()


def _decode_greedily(
    model: PreTrainedModel, rows: Sequence[Row], ends: Sequence[int]
) -> list[list[int]]:
    """Return the new tokens of each row, up to its end of text."""
    prompts = [row["input_ids_T"][: row["answer_start"]] for row in rows]
    input_ids_BT, mask_BT = _pad_on_the_left(prompts, model.device)
    longest = max(len(row["input_ids_T"]) - row["answer_start"] for row in rows)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    num_new = longest + SPARE_TOKENS
    if room is not None:
        num_new = max(1, min(num_new, room - input_ids_BT.shape[1]))
    own = model.generation_config
    assert own is not None, "a causal model has a generation config"
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=num_new,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )
    model.generation_config = GenerationConfig()  # else its own values fill what we leave open
    try:
        output_BT: Any = model.generate(
            inputs=input_ids_BT, attention_mask=mask_BT, generation_config=settings
        )
    finally:
        model.generation_config = own
    return [_until_end(new, ends) for new in output_BT[:, input_ids_BT.shape[1] :].tolist()]


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


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return the ids that end a text, by any of the model folder's files."""
    configs = (model.generation_config, model.config.get_text_config(), tokenizer)
    found = [getattr(config, "eos_token_id", None) for config in configs]
    listed = [ids if isinstance(ids, list) else [ids] for ids in found if ids is not None]
    return sorted({int(token) for ids in listed for token in ids})


def _until_end(new_ids: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(new_ids) if token in ends), len(new_ids))
    return new_ids[:stop]


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"cannot load the tokenizer of {folder}: {first_line}") from error
