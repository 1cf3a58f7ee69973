"""The step that a row's hidden states are rounded to, a long one that keeps to ``mean_kl``.

KL(p || p') between the teacher and the teacher of rounded states is measured through its own head,
on positions of the row that lie evenly apart. It grows with the square of the step, but for a
tenth that follows no law: so the third step is taken by the law of the two before it. Were the
longest that fits taken, it would be one whose sample lies low, and all positions above ``mean_kl``.
Nothing of another row is asked, so a row is the same in any shard and on any worker.

Dimensions: P = scored positions, S = those that are measured, V = vocabulary, D = hidden width,
E = components beyond a byte.
"""

import math
import statistics
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
_FIRST = 1 / 80  # of the states' root mean square: 1e-4 nats on SmolLM2-135M
_AIM = 0.93  # of the KL that is allowed
_TRIALS, _MOST_TRIALS = 3, 40


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
    step, kl = step_within(lambda at: rounding_kl(head, sample_SD, at), size, mean_kl)
    return Rounded(*in_steps(hidden_PD.float().cpu().numpy(), step), step, kl)


def step_within(
    kl_of: Callable[[float], float], size: float, mean_kl: float
) -> tuple[float, float]:
    """Return a step and its KL, which is at most ``mean_kl``, for states of this root mean square.

    No step is longer than ``size``. Of states that are all 0 any step will do.
    """
    step = _three_digits(size * _FIRST)
    if step == 0.0:
        return 1.0, 0.0
    laws = []
    for trial in range(1, _MOST_TRIALS + 1):
        kl = kl_of(step)
        if kl <= mean_kl and (trial >= _TRIALS or step >= size):
            return step, kl
        laws.append(math.log(max(kl, 1e-3 * mean_kl) / step**2))
        if trial < _TRIALS:
            step = math.sqrt(_AIM * mean_kl / math.exp(statistics.mean(laws)))
        else:  # a sample that lies high, or no law of squares: go down until one fits
            step *= min(math.sqrt(_AIM * mean_kl / kl), 0.97)
        step = _three_digits(min(step, size))
    return step, kl_of(step)


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
