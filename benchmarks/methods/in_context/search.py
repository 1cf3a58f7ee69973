"""The search for a learning rate, the same for every method, on seeds and tasks of its own."""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from statistics import fmean

from benchmarks.methods.in_context.answers import read_overall
from benchmarks.methods.in_context.methods import GRID, METHODS, RATES, Settings, step_name
from benchmarks.methods.in_context.recipes import write_search_recipe
from benchmarks.recipe_run import run_recipe_file

SEARCH_SEEDS = (100, 101, 102)  # the others for rates within NEAR of a method's best on the first
NEAR = 0.03  # of accuracy

Searched = dict[str, list[float]]  # accuracies by step, one a seed


def search_rates(pool: Executor, folder: Path, settings: Settings) -> Searched:
    """Search every method alike: ``RATES``, then beside the best, until none is at an edge.

    What comes near a method's best on the first seed is tried on the others too.
    """
    found: Searched = {}
    rates: dict[str, Sequence[float]] = dict.fromkeys(METHODS, RATES)
    first, *others = SEARCH_SEEDS
    for tried in itertools.count():
        try_rates(pool, folder, settings, rates, first, f"search_{tried}", found)
        beside = {name: untried_beside(name, found) for name in METHODS}
        rates = {name: untried for name, untried in beside.items() if untried}
        if not rates:
            break
    rivals = {name: near_best(name, found) for name in METHODS}
    rivals = {name: near for name, near in rivals.items() if len(near) > 1}
    for seed in others:
        try_rates(pool, folder, settings, rivals, seed, f"search_seed_{seed}", found)
    return found


def try_rates(
    pool: Executor,
    folder: Path,
    settings: Settings,
    rates: Mapping[str, Sequence[float]],
    seed: int,
    name: str,
    found: Searched,
) -> None:
    """Train methods at some rates, in two recipes, and add their accuracies to ``found``."""
    halves = [dict(list(rates.items())[part::2]) for part in (0, 1)]
    recipes = [
        write_search_recipe(folder, settings, seed, half, f"{name}_{part}")
        for part, half in enumerate(halves)
        if half
    ]
    for steps in pool.map(run_recipe_file, recipes):
        for student, numbers in read_overall(steps["results"]).items():
            found.setdefault(student, []).append(numbers["accuracy"])


def untried_beside(method: str, found: Searched) -> list[float]:
    """Return which rates beside the best one of the grid were not tried yet."""
    best = GRID.index(best_rate(method, found))
    beside = GRID[max(best - 1, 0) : best + 2]
    return [rate for rate in beside if step_name(method, rate) not in found]


def near_best(method: str, found: Searched) -> list[float]:
    """Return the rates whose mean accuracy is within ``NEAR`` of the best one's."""
    mean = means_of(method, found)
    return [rate for rate, accuracy in mean.items() if accuracy > max(mean.values()) - NEAR]


def best_rate(method: str, found: Searched) -> float:
    """Return the best rate by mean accuracy, of those that were tried on the most seeds."""
    mean = means_of(method, found)
    return max(mean, key=lambda rate: mean[rate])


def means_of(method: str, found: Searched) -> dict[float, float]:
    """Return the mean accuracy of each rate that was tried on the most seeds."""
    tried = {rate: found.get(step_name(method, rate), []) for rate in GRID}
    most = max(len(accuracies) for accuracies in tried.values())
    return {rate: fmean(seeds) for rate, seeds in tried.items() if len(seeds) == most}
