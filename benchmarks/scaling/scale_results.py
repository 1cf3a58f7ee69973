"""Results of ``scale_simulation.py``: what is assumed, what was measured, what each run came to."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.scaling.scale_costs import Driver
from benchmarks.scaling.shard_times import ShardTimes
from benchmarks.scaling.simulated_crew import Spent, Store, World

PARTS = (
    "the teacher",
    "stragglers",
    "second copies",
    "the object store",
    "waiting for the driver",
    "work of lost workers",
    "loading the engine",
    "the end of the run",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """Numbers that are not measured here."""

    tokens_a_second: float = 20_000.0  # one GPU, a teacher of some 8 B parameters, head and all
    bytes_a_token: float = (
        33.0  # docs/measured/storage.md: threshold, k = 16, every file of both tables
    )
    slow_fraction: float = 0.01
    slow_factor: float = 10.0
    mean_life_s: float = 500 * 3600.0
    load_s: float = 300.0
    store: Store = field(default_factory=Store)

    def world(self, times: ShardTimes, driver_s: float, shard_tokens: float) -> World:
        """Return the world of shards of one size."""
        return World(
            shard_s=shard_tokens / self.tokens_a_second,
            relative_S=times.relative_S,
            slow_fraction=self.slow_fraction,
            slow_factor=self.slow_factor,
            load_s=self.load_s,
            mean_life_s=self.mean_life_s,
            driver_s=driver_s,
            shard_bytes=shard_tokens * self.bytes_a_token,
            store=self.store,
        )


@dataclass
class Result:
    """One simulated run."""

    workers: int
    shard_tokens: float
    num_shards: int
    makespan_s: float
    spent: Spent
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

    @property
    def efficiency(self) -> float:
        """The share of the workers' time that went into work of the teacher that was kept."""
        return self.shares[PARTS[0]]

    def row(self) -> dict[str, Any]:
        shares = self.shares
        return {
            "workers": self.workers,
            "tokens a shard": f"{self.shard_tokens:,.0f}",
            "shards": f"{self.num_shards:,}",
            "hours": self.makespan_s / 3600,
            "million tokens/s": self.num_tokens / self.makespan_s / 1e6,
            "efficiency": self.efficiency,
            **{part: f"{100 * shares[part]:.1f} %" for part in PARTS[1:]},
            "copies": self.spent.num_copies,
            "workers lost": self.spent.num_lost,
            "requests/s": self.spent.num_requests / self.makespan_s,
        }


@dataclass
class Measured:
    """All numbers of a page."""

    assumed: Assumed
    teacher: str
    times: dict[str, ShardTimes]
    driver: Driver
    most_shards: int
    by_workers: list[Result] = field(default_factory=list)
    by_size: list[Result] = field(default_factory=list)
    by_trouble: list[Result] = field(default_factory=list)
    by_copies: list[Result] = field(default_factory=list)
    memory: float = 0.0
    memory_shards: int = 0
    listed: dict[str, float] = field(default_factory=dict)
    resumed: dict[str, float] = field(default_factory=dict)
