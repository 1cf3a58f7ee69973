"""The search of the experiment on preferences, with made-up win rates in the place of trainings."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import log10
from typing import Any

from benchmarks.methods.preference_search import SEEDS, Search
from benchmarks.methods.preference_steps import DCKD, DPO, METHODS, SFT_MORE, START, Run

RATES, FACTORS = (1e-3, 3e-3, 3e-4), (0.1, 3.0)


def won(run: Run, seed: int) -> float:
    """Best at rate 3e-4 with a tenth of DPO's strength, whose second seed tells another story."""
    rate = 0.05 * abs(log10(run.rate / 3e-4))
    strength = 0.02 * abs(log10(run.factor / 0.1))
    lost = 0.3 if seed == SEEDS[1] and run.method.name == DPO.name and run.factor < 1 else 0.0
    return 0.7 - rate - strength - lost


def searched() -> tuple[Search, list[tuple[str, int, dict[str, Run]]]]:
    calls: list[tuple[str, int, dict[str, Run]]] = []

    def measure(name: str, seed: int, runs: Mapping[str, Run]) -> dict[str, Any]:
        calls.append((name, seed, dict(runs)))
        return {
            step: {"wins": [won(run, seed)] * 3, "unlikely": 0.0, "training": {"cut": 0.0}}
            for step, run in runs.items()
        }

    with ThreadPoolExecutor(2) as pool:
        search = Search(RATES, FACTORS, measure, pool)
        search.carry_out()
    return search, calls


def test_every_method_is_searched_alike_and_a_second_seed_has_a_say() -> None:
    search, _ = searched()
    assert list(search.found) == list(METHODS)
    for method, tried in search.found.items():
        asked = {(run.rate, run.factor) for run in tried}
        assert len(asked) == len(tried) == (7 if method.strength else 3)
        best = search.best(method)
        assert best.rate == 3e-4
        assert best.factor == (0.1 if method.strength and method.name != DPO.name else 1.0)
        assert sum("won_again" in on for on in tried.values()) == min(4, len(tried))
    assert search.best(SFT_MORE).factor == 1.0


def test_processes_share_no_table_and_what_starts_from_dckd_has_its_best() -> None:
    search, calls = searched()
    for name, _, runs in calls:
        methods = {run.method.name for run in runs.values() if run.step != DCKD.name}
        kinds = {run.method.is_adpa for run in runs.values() if run.step != DCKD.name}
        assert len(kinds) <= 1, f"{name}: {methods}"
        later = [run for run in runs.values() if run.method.start != START]
        if later:
            best = search.best(DCKD)
            assert (runs[DCKD.name].rate, runs[DCKD.name].factor) == (best.rate, best.factor)
    assert len({name for name, _, _ in calls}) == len(calls)
