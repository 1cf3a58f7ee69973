"""What the experiments on methods share: paired effects, their intervals, verdicts and figure.

An effect is a method's number minus its baseline's on the same seed and the same episode (prompt,
sequence), so what both have in common cancels. Dimensions: S = seeds, E = episodes, G = groups of
these (their tasks), B = resamples.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float, float]  # mean, low, high
RESAMPLES = 2000
# Student's t at 0.975 for 1, 2, ... 20 degrees of freedom; more take that of 20.
QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
HOLDS, FAILS, UNKNOWN = "holds", "does not hold here", "cannot be told"


def paired_interval(effects_SE: npt.ArrayLike, groups_E: npt.ArrayLike | None = None) -> Interval:
    """Return mean and 95 % interval of paired effects [S, E] over new seeds and new episodes.

    With the group that each episode is of, over new groups: those are drawn, whole.

    Standard error by the two-way cluster bootstrap (Owen 2007, "The pigeonhole bootstrap",
    doi 10.1214/07-AOAS122): seeds and episodes are drawn anew, with replacement, each by itself.
    It counts what is left after both up to three times, so it errs towards wide intervals. Few
    seeds make a resampled variance (S - 1) / S too small, and quantiles of the normal too near:
    the error is multiplied by sqrt(S / (S - 1)), its quantile is Student's t of S - 1 degrees.
    Draws are seeded. Raises ValueError for fewer than two seeds, episodes or groups of them, or
    where an effect is not finite.
    """
    effects_SE = np.asarray(effects_SE, np.float64)
    if effects_SE.ndim != 2 or min(effects_SE.shape) < 2:
        raise ValueError(f"effects are {effects_SE.shape}, expected two seeds and two episodes")
    if not np.isfinite(effects_SE).all():
        raise ValueError("an effect is not finite: a run diverged, or a number is missing")
    num_seeds, num_episodes = effects_SE.shape
    names = np.arange(num_episodes) if groups_E is None else np.asarray(groups_E)
    groups, group_of_E = np.unique(names, return_inverse=True)
    if len(groups) < 2:
        raise ValueError(f"all episodes are of the group {groups[0]}, expected two groups")
    sums_SG = np.stack([np.bincount(group_of_E, effects_E) for effects_E in effects_SE])
    sizes_G = np.bincount(group_of_E)
    rng = np.random.default_rng(0)
    counts_BS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), RESAMPLES)
    of_groups = np.full(len(groups), 1 / len(groups))
    counts_BG = rng.multinomial(len(groups), of_groups, RESAMPLES)
    sums_B = ((counts_BS @ sums_SG) * counts_BG).sum(1)
    means_B = sums_B / (num_seeds * (counts_BG @ sizes_G))
    error = means_B.std() * np.sqrt(num_seeds / (num_seeds - 1))
    reach = QUANTILES[min(num_seeds - 1, len(QUANTILES)) - 1] * float(error)
    mean = float(effects_SE.mean())
    return mean, mean - reach, mean + reach


def verdict(low: float, high: float, claim: Literal["greater", "less"] = "greater") -> str:
    """Judge the claim that an effect is greater (less) than 0, by its interval.

    The claim "by no more than m" is "less" of the interval less m.
    """
    if claim == "less":
        low, high = -high, -low
    if low > 0.0:
        return HOLDS
    return FAILS if high < 0.0 else UNKNOWN


def said(interval: Interval, digits: int = 4) -> str:
    """Write an interval as ``+0.0123 [+0.0100, +0.0146]``."""
    mean, low, high = interval
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def plot_intervals(axis: Any, intervals: Mapping[str, Interval], label: str) -> None:
    """Draw effects with their intervals on a matplotlib axis, the first on top, 0 as a line."""
    for row, (mean, low, high) in enumerate(intervals.values()):
        colour = "#3465a4" if low > 0.0 or high < 0.0 else "#888a85"
        axis.plot([low, high], [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
        axis.plot([mean], [row], "o", color=colour, markersize=5)
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(intervals)), list(intervals))
    axis.set_xlabel(label)
    axis.invert_yaxis()


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, and let it go."""
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
