"""Numbers about preferences, as pure functions of scores; no model in here.

A score is a sum of log-probs, or an implicit reward. As in ``icl_metrics`` a tie never helps: an
accuracy counts what is strictly better. In a win rate a tie is half a win for each side, so two
equal students have 0.5.

Dimensions: P = prompts, N = resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.models.causal_lm.implicit_rewards import preference

RESAMPLES, LEVEL = 2_000, 0.95

Array = npt.NDArray[Any]
F64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WinRate:
    """Share of prompts won, a tie being half a win, with its bootstrap interval."""

    rate: float
    low: float
    high: float
    num_wins: int
    num_ties: int
    num_losses: int


def win_rate(first_P: Array, second_P: Array, *, seed: int) -> WinRate:
    """Compare two students' scores on the same prompts; the pair on a prompt is resampled as one.

    The interval of (second, first) mirrors that of (first, second): both draw the same prompts.
    """
    signs_P = np.sign(np.subtract(first_P, second_P, dtype=np.float64))
    shares_P = (signs_P + 1) / 2
    low, high = bootstrap_interval(shares_P, seed=seed)
    wins, losses = int((signs_P > 0).sum()), int((signs_P < 0).sum())
    return WinRate(float(shares_P.mean()), low, high, wins, len(signs_P) - wins - losses, losses)


def bootstrap_interval(values_P: Array, *, seed: int) -> tuple[float, float]:
    """Return the percentile interval (Efron 1979) of the mean over ``RESAMPLES`` of the prompts."""
    rng = np.random.default_rng(seed)
    count = len(values_P)
    means_N = [values_P[rng.integers(count, size=count)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means_N, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def response_numbers(lengths_P: Sequence[int], finished_P: Sequence[bool]) -> dict[str, float]:
    """Return mean length and the shares that ended by themselves, and that said nothing.

    Lengths count the token that ends a finished response, so one that is nothing else is empty.
    """
    lengths, finished = np.asarray(lengths_P), np.asarray(finished_P, bool)
    return {
        "response_tokens": float(lengths.mean()),
        "finished": float(finished.mean()),
        "empty": float((lengths - finished == 0).mean()),
    }


def reward_numbers(rewards_P: Array, lengths_P: Sequence[int]) -> dict[str, float]:
    """Return the mean over prompts of a response's reward, and of its reward per token."""
    rewards = np.asarray(rewards_P, np.float64)
    per_token_P = rewards / np.asarray(lengths_P)
    return {"reward": float(rewards.mean()), "reward_per_token": float(per_token_P.mean())}


def own_preference_numbers(logprobs_P2: Array, lengths_P2: Array) -> dict[str, float]:
    """Return a student's own view of P pairs (chosen, rejected), and its loss on the chosen ones.

    ``logprobs_P2`` are sums over responses of ``lengths_P2`` tokens; ``cross_entropy`` is the mean
    over all tokens of the chosen responses, nats.
    """
    sums = preference(*logprobs_P2.T)
    means = preference(*(logprobs_P2 / lengths_P2).T)
    return {
        "cross_entropy": float(-logprobs_P2[:, 0].sum() / lengths_P2[:, 0].sum()),
        "accuracy": sums.accuracy,
        "accuracy_per_token": means.accuracy,
        "margin": sums.margin,
        "margin_per_token": means.margin,
    }


def relative_preference_numbers(logprobs_P2: Array, baseline_P2: Array) -> dict[str, float]:
    """Return the view of the log-ratio to a baseline: DPO's implicit reward over its beta."""
    found = preference(*(logprobs_P2 - baseline_P2).T)
    return {"relative_accuracy": found.accuracy, "relative_margin": found.margin}
