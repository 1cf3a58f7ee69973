"""Rows of ``responses`` for the tiny models, and what a plain forward pass says of them.

Dimensions: A = tokens of all responses of a row, V = vocabulary, S = likeliest tokens kept.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM

from schemas.sample_id import sample_id_of
from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from schemas.tables.responses import RESPONSES, Responses
from stages.models.spec import EngineOptions, ModelSpec
from stages.stage import StageContext

F64Array = npt.NDArray[np.float64]
NUM_TOP = 5


def make_row(
    prompt: Sequence[int], responses: Sequence[Sequence[int]], vocab_size: int
) -> Responses:
    """Return a row whose student is made up: random likeliest tokens of falling probability."""
    ids = [token for response in responses for token in response]
    rng = np.random.default_rng([*prompt, *ids])
    top = [rng.permutation(vocab_size)[:NUM_TOP] for _ in ids]
    logprobs = -np.sort(rng.uniform(1.7, 6.0, (len(ids), NUM_TOP)))
    return Responses(
        sample_id=sample_id_of(np.array([*prompt, *ids])),
        prompt_ids_T=np.array(prompt),
        response_ids_A=np.array(ids),
        response_lengths_N=np.array([len(response) for response in responses], np.int32),
        finish_reasons_N=np.ones(len(responses), np.uint8),
        logprobs_A=np.full(len(ids), -2.0, np.float32),
        top_ids_AK=np.array(top),
        top_logprobs_AK=logprobs.astype(np.float16),
    )


def random_rows(
    rng: np.random.Generator, vocab_size: int, counts: Sequence[int]
) -> list[Responses]:
    """Return rows of ``counts`` responses each, with prompts and responses of mixed lengths."""
    return [
        make_row(
            rng.integers(1, vocab_size, rng.integers(2, 12)).tolist(),
            [rng.integers(1, vocab_size, rng.integers(1, 9)).tolist() for _ in range(count)],
            vocab_size,
        )
        for count in counts
    ]


def responses_of(row: Responses) -> list[list[int]]:
    """Cut a row's tokens into its responses."""
    left = row.response_ids_A.tolist()
    return [[left.pop(0) for _ in range(length)] for length in row.response_lengths_N]


def as_shard(rows: Sequence[Responses], vocab_size: int) -> pa.Table:
    """Return the rows as an input shard."""
    bound = RESPONSES.bind(vocab_size=vocab_size, sizes={"K": NUM_TOP})
    return pa.Table.from_batches([bound.to_batch(rows)])


def make_pair(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]
) -> PreferencePair:
    """Return a preference pair of finished responses."""
    return PreferencePair(
        sample_id=sample_id_of(np.array([*prompt, *chosen, *rejected])),
        split="train",
        prompt_ids_T=np.array(prompt),
        chosen_ids_C=np.array(chosen),
        rejected_ids_R=np.array(rejected),
        chosen_finished=True,
        rejected_finished=True,
    )


def as_pair_shard(pairs: Sequence[PreferencePair], vocab_size: int) -> pa.Table:
    """Return the pairs as an input shard."""
    return pa.Table.from_batches([PREFERENCE_PAIRS.bind(vocab_size=vocab_size).to_batch(pairs)])


def context_of(
    out: Path,
    vocab_size: int,
    folders: Mapping[str, Path],
    engine: Literal["vllm", "transformers"] = "transformers",
    **options: Any,
) -> StageContext:
    """Return a context with models by name, of width 32, in float32, on the CPU."""
    models = {name: ModelSpec(folder, "float32", engine, 32) for name, folder in folders.items()}
    cache_dir = next(iter(folders.values())).parent / "head_check"
    at = EngineOptions(device="cpu", cache_dir=cache_dir, **options)
    return StageContext(out, vocab_size, models, at)


@torch.no_grad()
def plain_logprobs(folder: Path, prompt: Any, response: Any) -> F64Array:
    """Return [A, V]: what predicts each response token, from one float64 pass over the sequence."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    sequence = [int(token) for part in (prompt, response) for token in part]
    logits_TV = model(input_ids=torch.tensor([sequence])).logits[0]
    predicts_AV = logits_TV[len(prompt) - 1 : len(sequence) - 1]
    logprobs_AV: F64Array = predicts_AV.log_softmax(-1).numpy()
    return logprobs_AV


def plain_logprobs_of_row(folder: Path, row: Responses) -> F64Array:
    """Return [A, V] for all responses of a row, end to end."""
    parts = [plain_logprobs(folder, row.prompt_ids_T, ids) for ids in responses_of(row)]
    return np.concatenate(parts)
