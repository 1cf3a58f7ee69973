"""The step that a row's hidden states are rounded to: the longest that keeps to ``mean_kl``.

KL(p || p') between the teacher and the teacher of rounded states is measured through its own head,
on positions of the row that lie evenly apart. It grows with the square of the step, but for a
tenth that follows no law, so two to five trials do. Nothing of another row is asked, so a row is
the same in any shard and on any worker.

Dimensions: P = scored positions, S = those that are measured, V = vocabulary, D = hidden width,
E = components beyond a byte.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.rounded_states import in_steps
from stages.models.causal_lm.language_head import LanguageHead
from stages.signals.scoring.logits import positions_per_block

MEASURED = 32  # positions of a row; a table's mean is over all of its rows
_MARGIN = 0.92  # of ``mean_kl``: of steps that are tried, the one whose sample lies low is taken
_FIRST = 1 / 80  # of the states' root mean square: 1e-4 nats on SmolLM2-135M
_LEAST = 0.96  # of the KL that is allowed: a longer step would save under a half per cent
_AIM = 0.98
_TRIALS, _MOST_TRIALS = 5, 40


@dataclass(frozen=True, slots=True)
class Rounded:
    """What a row of ``exact_int8`` holds of its states; ``rounding_kl`` is in nats."""

    hidden_codes_PD: npt.NDArray[np.int8]
    hidden_beyond_E: npt.NDArray[np.int32]
    hidden_step: float
    rounding_kl: float

    def columns(self) -> dict[str, Any]:
        """Return them by the names of the table's columns."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def rounded(head: LanguageHead, hidden_PD: Tensor, mean_kl: float) -> Rounded:
    """Return states [P, D], which are finite, in whole steps."""
    places_S = np.linspace(0, len(hidden_PD) - 1, min(len(hidden_PD), MEASURED)).astype(np.int64)
    sample_SD = hidden_PD[torch.from_numpy(places_S).to(hidden_PD.device)].float()
    size = float(hidden_PD.float().square().mean().sqrt())
    step, kl = longest_step(lambda at: rounding_kl(head, sample_SD, at), size, _MARGIN * mean_kl)
    return Rounded(*in_steps(hidden_PD.float().cpu().numpy(), step), step, kl)


def longest_step(
    kl_of: Callable[[float], float], size: float, mean_kl: float
) -> tuple[float, float]:
    """Return a step and its KL, which is at most ``mean_kl``, for states of this root mean square.

    No step is longer than ``size``. Of states that are all 0 any step will do.
    """
    step = _three_digits(size * _FIRST)
    if step == 0.0:
        return 1.0, 0.0
    best = (0.0, 0.0)
    for trial in range(1, _MOST_TRIALS + 1):
        kl = kl_of(step)
        if kl <= mean_kl and step > best[0]:
            best = step, kl
        is_near = best[1] >= _LEAST * mean_kl or best[0] >= size
        if best[0] and (is_near or trial >= _TRIALS):
            break
        factor = math.sqrt(_AIM * mean_kl / max(kl, 1e-3 * mean_kl))
        if trial >= _TRIALS:  # the law of squares does not hold here: go down until one fits
            factor = min(factor, 0.7)
        step = _three_digits(min(step * factor, size))
    return best


def rounding_kl(head: LanguageHead, hidden_SD: Tensor, step: float) -> float:
    """Return the mean KL(p || p') over some positions [S], p' of states in whole steps."""
    total = 0.0
    for block_BD in torch.split(hidden_SD, positions_per_block(head)):
        whole_BD = torch.round(block_BD / step) * step
        told, again = (head.logits(states).log_softmax(dim=1) for states in (block_BD, whole_BD))
        total += float((told.exp() * (told - again)).sum(dim=1).double().sum())
    return total / len(hidden_SD)


def _three_digits(value: float) -> float:
    """Return a step as it is stored: last bits of a KL, which differ, seldom move it."""
    return float(np.float32(f"{value:.2e}"))
