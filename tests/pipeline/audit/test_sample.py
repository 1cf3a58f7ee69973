"""Which rows are drawn and what is allowed: the guarantees, held to simulations."""

import numpy as np
import pytest

from pipeline.audit.sample import drawn_rows, finds, rows_needed
from pipeline.audit.tolerance import FALSE_ALARMS, allowed

PLACES = ("together", "in a shard")


def test_459_rows_find_a_fault_in_one_percent_with_99_percent() -> None:
    assert rows_needed(10**9) == 459 and rows_needed(300) == 300
    assert finds(459, 10**9) == pytest.approx(0.01, rel=0.01)
    assert finds(300, 300) == pytest.approx(1 / 300)


@pytest.mark.parametrize(
    "where", ["scattered", *(pytest.param(p, marks=pytest.mark.slow) for p in PLACES)]
)
def test_the_draw_keeps_that_promise_wherever_the_fault_is(where: str) -> None:
    """Of 1,000 draws of 5,000 rows, 50 of them wrong, at most 1 % miss all (or 1 % more)."""
    rng = np.random.default_rng(0)
    wrong = {
        "scattered": rng.choice(5000, 50, replace=False),
        "together": np.arange(2000, 2050),
        "in a shard": np.arange(4950, 5000),
    }[where]
    missed = sum(not np.isin(drawn_rows(5000, 459, seed), wrong).any() for seed in range(1000))
    assert missed / 1000 <= 0.02


@pytest.mark.parametrize(("num_rows", "num_drawn"), [(1, 1), (7, 7), (100, 99), (1000, 459)])
def test_rows_are_distinct_and_the_same_of_a_seed(num_rows: int, num_drawn: int) -> None:
    found = drawn_rows(num_rows, num_drawn, 3)
    assert len(set(found.tolist())) == num_drawn and 0 <= found.min() <= found.max() < num_rows
    assert found.tolist() == drawn_rows(num_rows, num_drawn, 3).tolist()


def test_every_row_may_be_drawn_alike() -> None:
    counts = np.bincount(np.concatenate([drawn_rows(50, 10, s) for s in range(5000)]), minlength=50)
    assert abs(counts / 5000 - 0.2).max() < 0.03


@pytest.mark.parametrize("noise", ["normal", "exponential", "lognormal"])
def test_false_alarms_are_as_rare_as_is_said(noise: str) -> None:
    """300 audits of 3,000 values with 400 of control: at most one alarm, where 0.3 are expected."""
    rng = np.random.default_rng(1)

    def values(size: int) -> np.ndarray:
        if noise == "normal":
            return np.abs(rng.normal(size=size))
        return rng.exponential(size=size) if noise == "exponential" else rng.lognormal(0, 0.7, size)

    alarms = 0
    for _ in range(300):
        bound = allowed(values(400), 3000, num_measures=4, floor=0.0)
        alarms += bool(values(3000).max() > bound)
    assert alarms / 300 <= FALSE_ALARMS + 1 / 300


def test_the_bound_is_never_below_the_floor_nor_far_above_the_control() -> None:
    assert allowed(np.zeros(100), 1000, num_measures=4, floor=5e-4) == 5e-4
    assert allowed(np.zeros(0), 1000, num_measures=4, floor=5e-4) == 5e-4
    control = np.abs(np.random.default_rng(0).normal(size=500)) * 1e-3
    assert control.max() < allowed(control, 1000, num_measures=4, floor=0.0) < 20 * control.max()
