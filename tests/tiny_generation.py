"""Prompts and students for the tests of generation, and what plain forward passes say of them.

Dimensions: T = tokens of a prompt, A = generated tokens, V = vocabulary, K = likeliest tokens kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from stages.models.engines.decoding import Decoding, Generated
from stages.models.engines.sequences import TokenIds
from stages.signals.student_responses.stage import StudentResponsesStage
from tests.episode_data import successor_model, whole_logprobs

# Nats. Float32 with keys and values kept and prompts padded, beside float64 in one pass: the same
# products summed in another order over two layers of width 64. Measured 1e-5.
TOLERANCE = 5e-4
LENGTHS = (7, 1, 90, 30, 2, 45, 90, 13)
MAX_TOKENS = 12
GREEDY = Decoding(max_tokens=MAX_TOKENS, stop_token_ids=(511,), temperature=0.0, top_p=1.0, top_k=5)
SAMPLED = Decoding(
    max_tokens=MAX_TOKENS, stop_token_ids=(511,), temperature=1.3, top_p=0.9, top_k=5
)
STOP = 40  # of the counting student
EMPTY = "empty response"


def mixed_prompts() -> list[TokenIds]:
    draw = np.random.default_rng(5)
    return [draw.integers(0, 512, length).astype(np.uint16) for length in LENGTHS]


def seeds_of(prompts: list[TokenIds]) -> list[int]:
    return [1000 + index for index in range(len(prompts))]


def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def slow_greedy(model: Any, prompt_T: TokenIds, decoding: Decoding) -> list[int]:
    """Return the likeliest tokens, one whole forward pass each."""
    ids: list[int] = prompt_T.tolist()
    new: list[int] = []
    with torch.no_grad():
        for _ in range(decoding.max_tokens):
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] in decoding.stop_token_ids:
                break
    return new


def assert_logprobs_are_plain(model: Any, prompt_T: TokenIds, response: Generated) -> None:
    """Hold a response's numbers to a forward pass over prompt and response."""
    whole_T = np.concatenate([prompt_T.astype(np.int64), response.token_ids_A])
    with torch.no_grad():
        logprobs_AV = whole_logprobs(model, whole_T)[len(prompt_T) - 1 :].numpy()
    rows = np.arange(len(response.token_ids_A))
    expected_A = logprobs_AV[rows, response.token_ids_A]
    np.testing.assert_allclose(response.logprobs_A, expected_A, rtol=0, atol=TOLERANCE)
    at_top_AK = logprobs_AV[rows[:, None], response.top_ids_AK]
    np.testing.assert_allclose(response.top_logprobs_AK, at_top_AK, rtol=0, atol=TOLERANCE)
    largest_AK = -np.sort(-logprobs_AV)[:, : response.top_ids_AK.shape[1]]
    np.testing.assert_allclose(response.top_logprobs_AK, largest_AK, rtol=0, atol=TOLERANCE)
    assert all(len(set(ids)) == len(ids) for ids in response.top_ids_AK.tolist())


def stage_of(**config: Any) -> StudentResponsesStage:
    body = {"stage": "student_responses", "input": "pairs", "model": "student", "max_tokens": 8}
    return StudentResponsesStage.model_validate({**body, **config})


def pair_of(prompt: Sequence[int], name: str = "") -> PreferencePair:
    return PreferencePair(
        sample_id=name or "-".join(map(str, prompt)),
        split="train",
        prompt_ids_T=np.array(prompt),
        chosen_ids_C=np.array([1]),
        rejected_ids_R=np.array([2]),
        chosen_finished=True,
        rejected_finished=True,
    )


def shard_of(pairs: Sequence[PreferencePair]) -> pa.Table:
    """Return the pairs in two batches."""
    bound, half = PREFERENCE_PAIRS.bind(vocab_size=1 << 16), len(pairs) // 2
    return pa.Table.from_batches([bound.to_batch(pairs[:half]), bound.to_batch(pairs[half:])])


def save_tokenizer(folder: Path, *, eos: int | None = STOP, template: str | None = None) -> None:
    """Save a tokenizer of one word a token; ``<a>`` and ``<b>`` are tokens of their own."""
    vocabulary = {f"w{token}": token for token in range(62)} | {"<a>": 62, "<b>": 63}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        eos_token=None if eos is None else f"w{eos}",
    )
    tokenizer.add_tokens(["<a>", "<b>"], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def save_counting_student(folder: Path) -> Path:
    """Save a student that counts up, and whose folder says that ``STOP`` ends a text."""
    model = successor_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = STOP
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
