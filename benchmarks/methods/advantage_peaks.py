"""Where a teacher's advantages are largest: on tokens that its reference would write, or on others?

The sum over the vocabulary of pi(a) A(a) is largest with all of pi on the token of the largest A,
however unlikely teacher and reference find it. Dimensions: P = positions, V = vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

UNLIKELY = 1e-3


@dataclass(frozen=True, slots=True)
class Peaks:
    """Means over positions, nats without beta: of the largest advantage, and of the token written.

    ``unlikely`` is the share of positions whose largest advantage is on a token to which the
    reference gives less than ``UNLIKELY``.
    """

    largest: float
    written: float
    unlikely: float


def peaks(aligned: Path, reference: Path, rows: Iterable[Mapping[str, Any]]) -> Peaks:
    """Measure the first response of each row of a table of responses."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (aligned, reference)
    ]
    found = []
    for row in rows:
        response_A = row["response_ids_A"][: row["response_lengths_N"][0]]
        ids_T = np.concatenate([row["prompt_ids_T"], response_A]).astype(np.int64)
        aligned_PV, reference_PV = (_logprobs(model, ids_T, len(response_A)) for model in models)
        found.append(
            peaks_of(aligned_PV, reference_PV, torch.from_numpy(ids_T[-len(response_A) :]))
        )
    largest, written, unlikely = torch.cat(found, dim=1).mean(dim=1).tolist()
    return Peaks(largest, written, unlikely)


def peaks_of(aligned_PV: Tensor, reference_PV: Tensor, written_P: Tensor) -> Tensor:
    """Return [3, P]: largest advantage, that of the token written, 1 where the peak is unlikely."""
    advantages_PV = aligned_PV - reference_PV
    largest_P, tokens_P = advantages_PV.max(dim=1)
    own_P = advantages_PV.gather(1, written_P[:, None])[:, 0]
    unlikely_P = reference_PV.gather(1, tokens_P[:, None])[:, 0].exp() < UNLIKELY
    return torch.stack([largest_P, own_P, unlikely_P.to(largest_P)])


@torch.inference_mode()
def _logprobs(model: Any, ids_T: Any, num_scored: int) -> Tensor:
    """Return [P, V] log-probs of the last tokens, each at the one before it."""
    logits_TV = model(torch.from_numpy(ids_T)[None]).logits[0]
    scored: Tensor = logits_TV[-num_scored - 1 : -1].double().log_softmax(dim=-1)
    return scored
