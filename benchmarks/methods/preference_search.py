"""The same search for every method of the experiment on preferences: rates, strengths, two seeds.

First all learning rates at the published strength, then the other strengths at the best of them,
then the other learning rates at the best strength; the best of all these on a second seed too, for
what wins on one seed may be lost on the next. A win rate is over SFT of the same seed.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np

from benchmarks.methods.preference_steps import DCKD, METHODS, START, Method, Run

SEEDS = 1000, 1001  # none of them is judged
FINALISTS = 4  # settings of a method that are tried on the second seed
Tried = dict[str, Any]  # what was measured of a run
Found = dict[Method, dict[Run, Tried]]
Measure = Callable[[str, int, Mapping[str, Run]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Search:
    """``measure`` trains runs on a seed, under the name of a recipe, and measures each by step.

    It is called in the processes of ``pool``, two at a time; ``factors`` multiply a strength.
    """

    rates: Sequence[float]
    factors: Sequence[float]
    measure: Measure
    pool: Executor
    found: Found = field(default_factory=dict)

    def carry_out(self) -> Found:
        """Return each method's runs; those that start from DCKD come last, from its best run."""
        after_sft = [method for method in METHODS if method.start == START]
        for methods in (after_sft, [method for method in METHODS if method not in after_sft]):
            self._try(
                [
                    Run(f"{method.name}-rate-{number}", method, rate)
                    for method in methods
                    for number, rate in enumerate(self.rates)
                ]
            )
            self._try(
                [
                    Run(f"{method.name}-strength-{number}", method, self.best(method).rate, factor)
                    for method in methods
                    if method.strength
                    for number, factor in enumerate(self.factors)
                ]
            )
            self._try(
                [
                    Run(f"{method.name}-again-{number}", method, rate, best.factor)
                    for method in methods
                    if (best := self.best(method)).factor != 1.0
                    for number, rate in enumerate(self.rates)
                    if rate != best.rate
                ]
            )
            finalists = [
                run
                for method in methods
                if len(self.found[method]) > 1
                for run in best_first(self.found[method])[:FINALISTS]
            ]
            self._try(finalists, again=True)
        return self.found

    def best(self, method: Method) -> Run:
        """Return the run that has won most so far; of two seeds, if any is known on both."""
        tried = self.found[method]
        return best_first({run: on for run, on in tried.items() if "won_again" in on} or tried)[0]

    def _try(self, runs: Sequence[Run], *, again: bool = False) -> None:
        """Measure ``runs`` on the first seed, or ``again`` on the second.

        Methods of ADPA share tables that no other reads, so they have a process of their own.
        """
        if not runs:
            return
        seed = SEEDS[again]
        name = f"search-{seed}-{len(self.found)}-{sum(map(len, self.found.values()))}"
        self.measure(name, seed, {})  # what both processes read
        given = {}
        if runs[0].method.start == DCKD.name:
            best = self.best(DCKD)
            given = {DCKD.name: Run(DCKD.name, DCKD, best.rate, best.factor)}
        parts = [
            given | {run.step: run for run in runs if run.method.is_adpa == is_adpa}
            for is_adpa in (False, True)
        ]
        parts = [part for part in parts if len(part) > len(given)]
        names = [f"{name}-{number}" for number in range(len(parts))]
        measured: dict[str, Any] = {}
        for students in self.pool.map(self.measure, names, repeat(seed), parts):
            measured |= students
        for run in runs:
            student = measured[run.step]
            won = float(np.mean(student["wins"]))
            if again:
                self.found[run.method][run]["won_again"] = won
            else:
                tried = {"win_rate": won, "unlikely": student["unlikely"]} | student["training"]
                self.found.setdefault(run.method, {})[run] = tried


def best_first(tried: Mapping[Run, Tried]) -> list[Run]:
    """Order runs by their win rate, by the mean of both seeds where two are known."""

    def won(run: Run) -> float:
        first: float = tried[run]["win_rate"]
        return first + float(tried[run].get("won_again", first))

    return sorted(tried, key=won, reverse=True)
