"""Where a teacher's advantages are largest, and the weight beyond which a student goes there.

At a state, ADPA with the reference p in the place of the chosen responses is, per position,

    J(pi) = -sum_a p(a) log pi(a) - gamma sum_a pi(a) A(a)

which is convex in pi; with lambda the multiplier of sum_a pi(a) = 1 its minimum is at

    pi(a) = p(a) / (lambda - gamma A(a)),    lambda > gamma A_max

Let p be 0 on the token of the largest A. Nothing goes there while gamma is at most

    limit = sum_a p(a) / (A_max - A(a))

and beyond it 1 - limit / gamma of the mass does: lambda falls no further than gamma A_max. A p of
nearly 0 there changes this little. A is in nats without beta, gamma the weight of such advantages
(1.6 in the published code).
Dimensions: P = positions, V = vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

UNLIKELY = 1e-3  # a probability by the reference
_HALVINGS = 100
Rows = Sequence[Mapping[str, Any]]  # of a table of responses; the first of each row is measured


@dataclass(frozen=True, slots=True)
class Peaks:
    """Means over positions (``limit``: the median), nats without beta.

    Advantages: the largest, that of the token written, that expected of the aligned teacher itself,
    which is KL(aligned || reference). ``unlikely`` is the share of positions whose largest is on a
    token to which the reference gives less than ``UNLIKELY``; ``on_unlikely`` what the reference
    gives to all such tokens, ``optima`` what the optimum does at each weight.
    """

    largest: float
    written: float
    aligned: float
    unlikely: float
    limit: float
    on_unlikely: float
    optima: tuple[float, ...]


def peaks(aligned: Path, reference: Path, rows: Rows, weights: Sequence[float]) -> Peaks:
    """Measure the positions of ``rows``."""
    return peaks_of(
        logprobs_of(aligned, rows), logprobs_of(reference, rows), _written(rows), weights
    )


def peaks_of(
    aligned_PV: Tensor, reference_PV: Tensor, written_P: Tensor, weights: Sequence[float]
) -> Peaks:
    """Measure positions whose log-probs are given, in float64."""
    advantages_PV = aligned_PV - reference_PV
    largest_P, tokens_P = advantages_PV.max(dim=1)
    reference_PV = reference_PV.exp()
    is_unlikely_PV = reference_PV < UNLIKELY
    optima = [optimum(reference_PV, advantages_PV, weight) for weight in weights]
    return Peaks(
        largest=float(largest_P.mean()),
        written=float(_at(advantages_PV, written_P).mean()),
        aligned=float((aligned_PV.exp() * advantages_PV).sum(dim=1).mean()),
        unlikely=float(_at(is_unlikely_PV, tokens_P).double().mean()),
        limit=float(limits(reference_PV, advantages_PV).median()),
        on_unlikely=float((reference_PV * is_unlikely_PV).sum(dim=1).mean()),
        optima=tuple(float((best * is_unlikely_PV).sum(dim=1).mean()) for best in optima),
    )


def limits(anchors_PV: Tensor, advantages_PV: Tensor) -> Tensor:
    """Return the limit [P] of the module; ``anchors_PV`` are the probabilities p."""
    largest_P1, tokens_P1 = advantages_PV.max(dim=1, keepdim=True)
    anchors_PV = anchors_PV.scatter(1, tokens_P1, 0.0)
    gaps_PV = (largest_P1 - advantages_PV).scatter(1, tokens_P1, 1.0)
    return (anchors_PV / gaps_PV).sum(dim=1)


def optimum(anchors_PV: Tensor, advantages_PV: Tensor, weight: float) -> Tensor:
    """Return the optimum [P, V] of the module, for probabilities p that are all above 0.

    What lambda exceeds ``weight`` A_max by is at least p on the largest, at most 1: halved until it
    is known to float64.
    """
    largest_P1, tokens_P1 = advantages_PV.max(dim=1, keepdim=True)
    gaps_PV = weight * (largest_P1 - advantages_PV)
    low_P1 = anchors_PV.gather(1, tokens_P1)
    high_P1 = torch.ones_like(low_P1)
    for _ in range(_HALVINGS):
        middle_P1 = (low_P1 + high_P1) / 2
        is_low_P1 = (anchors_PV / (middle_P1 + gaps_PV)).sum(dim=1, keepdim=True) > 1.0
        low_P1 = torch.where(is_low_P1, middle_P1, low_P1)
        high_P1 = torch.where(is_low_P1, high_P1, middle_P1)
    return anchors_PV / (high_P1 + gaps_PV)


def unlikely_share(reference: Path, rows: Rows) -> float:
    """Return the share of written tokens to which the reference gives less than ``UNLIKELY``."""
    return float(
        (_at(logprobs_of(reference, rows).exp(), _written(rows)) < UNLIKELY).double().mean()
    )


@torch.inference_mode()
def logprobs_of(folder: Path, rows: Rows) -> Tensor:
    """Return the log-probs [P, V] of a model at the tokens written, each from the one before it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    scored = []
    for row in rows:
        ids_T = np.concatenate([row["prompt_ids_T"], _first(row)]).astype(np.int64)
        logits_TV = model(torch.from_numpy(ids_T)[None]).logits[0]
        scored.append(logits_TV[-len(_first(row)) - 1 : -1].double().log_softmax(dim=-1))
    return torch.cat(scored)


def _first(row: Mapping[str, Any]) -> Any:
    return row["response_ids_A"][: row["response_lengths_N"][0]]


def _written(rows: Rows) -> Tensor:
    return torch.from_numpy(np.concatenate([_first(row) for row in rows]).astype(np.int64))


def _at(values_PV: Tensor, tokens_P: Tensor) -> Tensor:
    return values_PV.gather(1, tokens_P[:, None])[:, 0]
