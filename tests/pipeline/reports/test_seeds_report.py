"""Students of several seeds: their means, and differences with the interval of Student's t."""

import io
import math
import statistics
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline.planning.plan import PlannedStep
from pipeline.reports.seeds_report import half_width, seeds_table
from stages.student.train.stage import TrainStage


def planned(name: str, seed: int, loss: str) -> PlannedStep:
    stage = TrainStage.model_validate(
        {
            "stage": "train",
            "student": "s",
            "data": ["d"],
            "objective": {"loss": loss},
            "max_steps": 1,
            "seed": seed,
        }
    )
    identity = stage.hashed() | {"inputs": [], "models": [{"weights": "w"}]}
    return PlannedStep(name, stage, identity, f"{name}-{seed}", Path("x"))


def metrics(kl: float) -> dict[str, float]:
    return {"cross_entropy": 2 * kl, "kl_to_teacher": kl}


def shown(measured: list[tuple[PlannedStep, dict[str, float]]]) -> list[list[str]]:
    table = seeds_table(measured)
    assert table is not None
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in out.getvalue().splitlines()
        if line.startswith("│")
    ]


def test_differences_are_paired_by_seed() -> None:
    # Seeds move both by the same amount, so the difference is sure where the means are not.
    rows = shown(
        [(planned(f"ce_{s}", s, "cross_entropy"), metrics(2.0 + s)) for s in (0, 1, 2)]
        + [(planned(f"kd_{s}", s, "kd"), metrics(1.5 + s)) for s in (0, 1, 2)]
    )
    spread = 4.3027 * 1.0 / math.sqrt(3)
    assert rows[0] == ["ce", "3", f"6.000 ± {2 * spread:.3f}", f"3.000 ± {spread:.3f}", "-"]
    assert rows[1][3] == f"2.500 ± {spread:.3f}"
    assert rows[2] == ["kd - ce", "3", "-1.000 ± 0.000", "-0.500 ± 0.000", "-"]


def test_one_seed_and_other_settings_are_no_group() -> None:
    assert seeds_table([(planned("a", 0, "kd"), metrics(1.0))]) is None
    both = [
        (planned("a", 0, "kd"), metrics(1.0)),
        (planned("b", 1, "cross_entropy"), metrics(1.0)),
    ]
    assert seeds_table(both) is None


@pytest.mark.parametrize("count", [2, 4, 10, 11, 40])
def test_the_interval_is_that_of_students_t(count: int) -> None:
    values = [math.sin(n) for n in range(count)]
    # The quantile by integrating the density of t, in float64.
    freedom = count - 1
    t = torch.linspace(0.0, 20.0, 2_000_001, dtype=torch.float64)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = (1 + t**2 / freedom) ** (-(freedom + 1) / 2) * math.exp(log_scale)
    density /= math.sqrt(freedom * math.pi)
    quantile = float(t[torch.searchsorted(torch.cumulative_trapezoid(density, t), 0.475)])
    expected = quantile * statistics.stdev(values) / math.sqrt(count)
    assert half_width(values) == pytest.approx(expected, rel=2e-4)
