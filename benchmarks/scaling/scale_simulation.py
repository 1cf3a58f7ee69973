"""How far does one run scale: 1,000 workers, 10^12 tokens, a million shards, and what gives first?

The dispatcher is the real one; its crew is simulated on a virtual clock (``simulated_crew``). Times
of shards are drawn from those of real runs (``shard_times``), over their mean, and scaled to a
GPU's speed, which is assumed, as are lives of workers and the object store's figures. What the
driver does for a shard is measured here (``ray_driver``).
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

from benchmarks.bars import Bar, at_least, at_most, benchmark_parser, finish
from benchmarks.scaling.ray_driver import ray_driver_cost
from benchmarks.scaling.scale_costs import (
    Driver,
    dispatch_cost,
    dispatch_memory,
    list_costs,
    resume_costs,
    step_tasks,
)
from benchmarks.scaling.scale_report import write_report
from benchmarks.scaling.scale_results import Assumed, Measured, Result
from benchmarks.scaling.shard_times import SMALL, TEACHER, shard_times
from benchmarks.scaling.simulated_crew import SimulatedCrew, VirtualClock, World, unheard
from pipeline.executors import stragglers
from pipeline.executors.dispatch import Limits, dispatch

TOKENS_A_WORKER = 1e9  # so that 1,000 workers have 10^12
SHARD_TOKENS = 1e6
WORKERS = (1, 10, 100, 1000)
SIZES = (1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7)
TROUBLED_SIZES = (3e6, 1e7)
COPIED_SHARDS = (20, 100, 1000)  # of a worker
TROUBLES: dict[str, dict[str, Any]] = {
    "none": {"slow_fraction": 0.0, "mean_life_s": 1e12},
    "5 % of shards 10x slow": {"slow_fraction": 0.05},
    "workers live 24 h": {"mean_life_s": 24 * 3600.0},
    "workers live 4 h": {"mean_life_s": 4 * 3600.0},
}
MOST_SHARDS = 100_000  # of a run that is not about their number
MAX_HOURS_WITH_COPIES = 0.8
MIN_EFFICIENCY, MAX_DISPATCH_US, MAX_DRIVER_MS, MAX_BYTES_A_SHARD = 0.85, 100.0, 1.0, 100.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write scaling.md and scaling.png to this folder")
    options = parser.parse_args(arguments)
    found = measure(options.cache, quick=options.quick)
    bars = judge(found)
    runs = [*found.by_workers, *found.by_size, *found.by_trouble, *found.by_copies]
    if options.docs:
        write_report(options.docs, found, bars)
    return finish(bars, [{"trouble": run.note, **run.row()} for run in runs], options.json)


def measure(cache: Path, *, quick: bool) -> Measured:
    """Measure what the driver does, then simulate; ``quick`` takes far fewer shards."""
    most_shards, num_dispatched = (20_000, 10_000) if quick else (MOST_SHARDS, 100_000)
    times = shard_times(cache, quick=quick)
    teacher = SMALL if quick else TEACHER
    dispatch_s = {workers: dispatch_cost(workers, num_dispatched) for workers in WORKERS}
    on_ray_s = {workers: ray_driver_cost(workers, 5 + 500 // workers) for workers in WORKERS}
    driver = Driver(dispatch_s, on_ray_s)
    assumed = Assumed()
    found = Measured(assumed, teacher, times, driver, most_shards)

    def run(workers: int, shard_tokens: float, most: int, note: str, **changes: Any) -> Result:
        driver_s = driver.on_ray_s[workers]
        world = replace(assumed.world(times[teacher], driver_s, shard_tokens), **changes)
        num_shards = min(most, round(TOKENS_A_WORKER * workers / shard_tokens))
        started = perf_counter()
        result = simulate(world, workers, shard_tokens, num_shards, note)
        print(f"{workers} workers, {shard_tokens:g} a shard: {perf_counter() - started:.0f} s")
        return result

    most_anywhere = most_shards if quick else 1_000_000
    found.by_workers = [run(workers, SHARD_TOKENS, most_anywhere, "") for workers in WORKERS]
    found.by_size = [run(WORKERS[-1], size, most_shards, "", load_s=0.0) for size in SIZES]
    found.by_trouble = [
        run(WORKERS[-1], size, most_shards, note, **changes)
        for note, changes in TROUBLES.items()
        for size in TROUBLED_SIZES
    ]
    for a_worker in COPIED_SHARDS:
        most = min(a_worker * WORKERS[-1], most_anywhere)
        with patch.object(stragglers, "SLOW", math.inf):
            found.by_copies.append(run(WORKERS[-1], SHARD_TOKENS, most, "without"))
        found.by_copies.append(run(WORKERS[-1], SHARD_TOKENS, most, "with"))
    found.memory_shards = num_dispatched
    found.memory = dispatch_memory(WORKERS[-1], num_dispatched)
    found.listed = list_costs(10_000 if quick else 1_000_000)
    found.resumed = resume_costs(500 if quick else 5000, 2**26 if quick else 2**30)
    return found


def simulate(world: World, workers: int, shard_tokens: float, num_shards: int, note: str) -> Result:
    """Drive the real dispatcher until all shards are done."""
    clock = VirtualClock()
    crew = SimulatedCrew(world, clock)
    limits = Limits(workers, max_attempts=3, shard_timeout_s=None)
    tasks = step_tasks(num_shards)
    for _ in dispatch(crew, tasks, limits, warned=unheard, clock=clock, files=crew):
        pass
    return Result(workers, shard_tokens, num_shards, clock.now, crew.spent, note)


def judge(found: Measured) -> list[Bar]:
    """A run has to be long for its efficiency to count: ``--quick`` has none of 1,000 workers."""
    workers = WORKERS[-1]
    long = [run for run in found.by_workers if run.num_shards >= 1000 * run.workers][-1]
    return [
        at_least(
            f"efficiency of {long.workers:,} workers, {SHARD_TOKENS:,.0f} tokens a shard",
            long.efficiency,
            MIN_EFFICIENCY,
        ),
        at_most(
            f"hours of {workers:,} workers, {found.by_copies[0].num_shards:,} shards: with second "
            f"copies over without",
            found.by_copies[1].makespan_s / found.by_copies[0].makespan_s,
            MAX_HOURS_WITH_COPIES,
        ),
        at_most(
            f"dispatcher with {workers:,} workers, us a shard",
            1e6 * found.driver.dispatch_s[workers],
            MAX_DISPATCH_US,
        ),
        at_most(
            f"driver with {workers:,} workers on Ray, ms a shard",
            1e3 * found.driver.on_ray_s[workers],
            MAX_DRIVER_MS,
        ),
        at_most("list of shards, bytes a shard", found.listed["bytes a shard"], MAX_BYTES_A_SHARD),
    ]


if __name__ == "__main__":
    sys.exit(main())
