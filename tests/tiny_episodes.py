"""Episodes of random tokens for the tiny models, and what a plain forward pass says of them.

Dimensions: T = tokens, V = vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM

from schemas.tables.episodes import EPISODES, Episode

Ids = npt.NDArray[np.int64]


def make_episode(
    rng: np.random.Generator,
    *,
    num_demonstrations: int = 4,
    candidates: Sequence[Sequence[int]] = ((7,), (8,), (9, 10)),
    gold: int = 0,
    answer: Sequence[int] | None = None,
    repeat_first: bool = False,
    split: str = "train",
) -> Episode:
    """Return an episode of mixed lengths; ``repeat_first`` makes two demonstrations equal."""
    parts = [
        (rng.integers(11, 200, rng.integers(3, 9)), rng.integers(200, 250, rng.integers(1, 4)))
        for _ in range(num_demonstrations)
    ]
    if repeat_first:
        parts[1] = parts[0]
    separator = np.array([1, 2])
    pieces: list[Ids] = []
    spans = []
    at = 0
    for text, label in parts:
        spans.append((at, at + len(text), at + len(text) + len(label)))
        pieces += [text, label, separator]
        at = spans[-1][2] + len(separator)
    query = rng.integers(11, 200, rng.integers(4, 9))
    right = np.array(candidates[gold] if answer is None else answer)
    input_ids_T = np.concatenate([*pieces, query, right])
    flat = [token for candidate in candidates for token in candidate]
    return Episode(
        sample_id=f"{int(rng.integers(0, 1 << 60)):024x}",
        split=split,
        task="task",
        kind="multiple_choice" if candidates else "generation",
        query_id="0" * 24,
        draw=0,
        input_ids_T=input_ids_T,
        demonstrations_M3=np.array(spans, np.int32).reshape(-1, 3),
        query_start=at,
        answer_start=at + len(query),
        candidate_ids_C=np.array(flat, np.int64),
        candidate_lengths_N=np.array([len(c) for c in candidates], np.int32),
        gold=gold if candidates else -1,
    )


def as_shard(episodes: Sequence[Episode], vocab_size: int) -> pa.Table:
    """Return the episodes as an input shard."""
    return pa.Table.from_batches([EPISODES.bind(vocab_size=vocab_size).to_batch(episodes)])


class PlainModel:
    """A transformers model in float64: one forward pass a sequence, nothing shared or batched."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    @torch.no_grad()
    def logprob(self, prompt_T: Any, continuation_T: Any) -> float:
        """Return log p(continuation | prompt), token by token."""
        total = 0.0
        ids = [int(token) for token in prompt_T]
        for token in continuation_T:
            logits_V = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            total += float(logits_V.log_softmax(-1)[int(token)])
            ids.append(int(token))
        return total
