"""How far does one run scale: 1,000 workers, 10^12 tokens, a million shards, and what gives first?

The dispatcher is the real one; its crew is simulated on a virtual clock (``simulated_crew``). Times
of shards are drawn from those of real runs (``shard_times``), over their median, and scaled to a
GPU's speed, which is assumed, as are lives of workers and the object store's figures. What the
driver does for a shard is measured here: the dispatcher, Ray's ``wait`` over that many workers, and
Ray's overhead a shard (docs/executors.md).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.scale_costs import (
    Driver,
    dispatch_cost,
    dispatch_memory,
    list_costs,
    ray_wait_costs,
    resume_costs,
    step_tasks,
)
from benchmarks.shard_times import TEACHER, ShardTimes, shard_times
from benchmarks.simulated_crew import SimulatedCrew, Spent, Store, VirtualClock, World, unheard
from pipeline.dispatch import Limits, dispatch

TOKENS_A_SECOND = 20_000.0  # assumed: one GPU, a teacher of some 8 B parameters, prefill and head
BYTES_A_TOKEN = 33.0  # docs/storage.md: threshold, k = 16, every file counted
INPUT_BYTES_A_TOKEN = 2.1  # the same page: the documents table
TOKENS_A_WORKER = 1e9  # so that 1,000 workers have 10^12
SHARD_TOKENS = 1e6
WORKERS = (1, 10, 100, 1000)
SIZES = (3e4, 1e5, 3e5, 1e6, 3e6, 1e7)
MOST_SHARDS = 1_000_000  # of one simulation; smaller shards are simulated for fewer tokens
PARTS = (
    "the teacher",
    "stragglers",
    "the object store",
    "waiting for the driver",
    "work of lost workers",
    "loading the engine",
    "the end of the run",
)
MIN_EFFICIENCY, MAX_DISPATCH_US, MAX_BYTES_A_SHARD = 0.85, 100.0, 100.0


@dataclass
class Result:
    """One simulated run."""

    workers: int
    shard_tokens: float
    num_shards: int
    makespan_s: float
    spent: Spent
    host_s: float = 0.0
    note: str = ""

    @property
    def num_tokens(self) -> float:
        return self.num_shards * self.shard_tokens

    @property
    def shares(self) -> dict[str, float]:
        """Return what the workers' seconds went for; the rest is waiting for the last shards."""
        total = self.workers * self.makespan_s
        shares = {part: self.spent.seconds[part] / total for part in PARTS[:-1]}
        return {**shares, PARTS[-1]: max(0.0, 1.0 - sum(shares.values()))}

    def row(self) -> dict[str, Any]:
        shares = self.shares
        return {
            "workers": self.workers,
            "tokens a shard": f"{self.shard_tokens:,.0f}",
            "shards": f"{self.num_shards:,}",
            "hours": self.makespan_s / 3600,
            "million tokens/s": self.num_tokens / self.makespan_s / 1e6,
            "efficiency": shares["the teacher"],
            **{part: f"{100 * shares[part]:.1f} %" for part in PARTS[1:]},
            "workers lost": self.spent.num_lost,
            "requests/s": self.spent.num_requests / self.makespan_s,
        }


def simulate(
    world: World, workers: int, shard_tokens: float, num_tokens: float, *, note: str = ""
) -> Result:
    """Drive the real dispatcher over as many shards as the tokens need."""
    num_shards = min(MOST_SHARDS, max(workers, round(num_tokens / shard_tokens)))
    clock = VirtualClock()
    crew = SimulatedCrew(world, clock)
    tasks = step_tasks(num_shards)
    limits = Limits(workers, max_attempts=3, shard_timeout_s=None)
    started, makespan_s = perf_counter(), 0.0
    for _ in dispatch(crew, tasks, limits, warned=unheard, clock=clock):
        makespan_s = clock.now
    host_s = perf_counter() - started
    return Result(workers, shard_tokens, num_shards, makespan_s, crew.spent, host_s, note)


def world_of(times: ShardTimes, driver: Driver, workers: int, shard_tokens: float) -> World:
    return World(
        shard_s=shard_tokens / TOKENS_A_SECOND,
        relative_S=times.relative_S,
        driver_s=driver.seconds(workers),
        shard_bytes=shard_tokens * (BYTES_A_TOKEN + INPUT_BYTES_A_TOKEN),
        store=Store(),
    )


@dataclass
class Measured:
    """All numbers of a page."""

    times: dict[str, ShardTimes]
    driver: Driver
    by_workers: list[Result] = field(default_factory=list)
    by_size: list[Result] = field(default_factory=list)
    by_trouble: list[Result] = field(default_factory=list)
    memory: float = 0.0
    listed: dict[str, float] = field(default_factory=dict)
    resumed: dict[str, float] = field(default_factory=dict)


def measure(cache: Path, *, quick: bool) -> Measured:
    num_shards = 20_000 if quick else 200_000
    most = 20_000 if quick else MOST_SHARDS
    driver = Driver(
        {workers: dispatch_cost(workers, num_shards) for workers in WORKERS},
        ray_wait_costs(WORKERS),
    )
    found = Measured(shard_times(cache), driver)
    times = found.times[TEACHER]

    def run(workers: int, shard_tokens: float, note: str = "", **changes: Any) -> Result:
        world = replace(world_of(times, driver, workers, shard_tokens), **changes)
        tokens = min(TOKENS_A_WORKER * workers, most * shard_tokens)
        result = simulate(world, workers, shard_tokens, tokens, note=note)
        print(
            f"{workers} workers, {shard_tokens:,.0f} tokens a shard {note}: {result.host_s:.0f} s"
        )
        return result

    found.by_workers = [run(workers, SHARD_TOKENS) for workers in WORKERS]
    found.by_size = [
        found.by_workers[-1] if size == SHARD_TOKENS else run(WORKERS[-1], size) for size in SIZES
    ]
    found.by_trouble = [
        run(WORKERS[-1], size, note, **changes)
        for note, changes in TROUBLES.items()
        for size in (1e6, 1e7)
    ]
    found.memory = dispatch_memory(WORKERS[-1], num_shards // 2)
    found.listed = list_costs(10_000 if quick else 1_000_000)
    found.resumed = resume_costs(500 if quick else 5000, 2**26 if quick else 2**30)
    return found


TROUBLES: dict[str, dict[str, Any]] = {
    "no straggler, no loss": {"slow_fraction": 0.0, "mean_life_s": 1e12},
    "5 % of shards 10x slow": {"slow_fraction": 0.05},
    "a worker lives 24 h": {"mean_life_s": 24 * 3600.0},
    "a worker lives 4 h": {"mean_life_s": 4 * 3600.0},
}
