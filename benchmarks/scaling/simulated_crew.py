"""A crew of simulated workers on a virtual clock, for the real dispatcher to drive.

Each worker loads its engine, takes shards and dies when its life is over, as ``dispatch.Crew`` says
of real ones. What a shard costs is drawn by ``ShardCost``; handing one out takes the driver's time,
during which nothing else is handed out; requests to the object store wait for the prefix's rate.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.executors.dispatch import Done, Event, Lost, Ready
from pipeline.executors.shard_task import Task
from pipeline.executors.worker import Job
from schemas.storage.records import ShardRecord

F64Array = npt.NDArray[np.float64]
DRAWS_AT_ONCE = 65_536


@dataclass(slots=True)
class VirtualClock:
    """Seconds since the run began; only the crew moves it on."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """An object store as one prefix of it behaves: requests of a shard, and what each costs."""

    gets: int = 2
    puts: int = 2
    latency_s: float = 0.05
    gets_a_second: float = 5500.0
    puts_a_second: float = 3500.0
    bytes_a_second: float = 100e6  # of one stream


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is simulated; every number that is assumed and not measured is here."""

    shard_s: float  # the teacher's time for a shard, on average
    relative_S: F64Array  # measured times of shards over their mean, drawn from at random
    slow_fraction: float = 0.01
    slow_factor: float = 10.0
    load_s: float = 300.0
    mean_life_s: float = 500 * 3600.0
    driver_s: float = 0.0
    shard_bytes: float = 0.0  # read and written together
    store: Store | None = None
    seed: int = 0


@dataclass
class Spent:
    """Seconds of workers, by what they went for, and counts."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_lost: int = 0
    num_requests: int = 0
    num_copies: int = 0


class _Prefix:
    """Requests of one kind, one after another at a rate: who comes too early waits."""

    def __init__(self, a_second: float) -> None:
        self.interval_s, self.free_at = 1.0 / a_second, 0.0

    def wait_s(self, now: float, count: int) -> float:
        start = max(now, self.free_at)
        self.free_at = start + count * self.interval_s
        return start - now


@dataclass(frozen=True, slots=True)
class _InHand:
    """What a worker does: since when, which shard, and how long it takes, by what for."""

    since: float
    index: int
    work_s: float
    straggling_s: float
    store_s: float


class SimulatedCrew:
    """See ``dispatch.Crew``; as there are no files, it is ``CopiedFiles``, too."""

    def __init__(self, world: World, clock: VirtualClock) -> None:
        self.world, self.clock, self.spent = world, clock, Spent()
        self._random = np.random.default_rng(world.seed)
        self._draws = self._draw()
        self._heap: list[tuple[float, int, Event]] = []
        self._ends_at: dict[int, float] = {}
        self._idle_since: dict[int, float] = {}
        self._in_hand: dict[int, _InHand] = {}
        self._copied: set[int] = set()  # shards of which there is a copy, and those of them
        self._made: set[int] = set()  # that are made
        self._num_started = self._num_pushed = self.num_lost_at_start = 0
        if world.store is not None:
            self._gets = _Prefix(world.store.gets_a_second)
            self._puts = _Prefix(world.store.puts_a_second)

    def start(self) -> int:
        self._num_started += 1
        worker, now = self._num_started, self.clock.now
        life_s = float(self._random.exponential(self.world.mean_life_s))
        self._ends_at[worker] = now + life_s
        self.spent.seconds["loading the engine"] += min(life_s, self.world.load_s)
        if life_s < self.world.load_s:
            self.num_lost_at_start += 1
        else:
            self._push(now + self.world.load_s, Ready(worker))
        self._push(now + life_s, Lost(worker, "its life was over"))  # idle ones are heard of, too
        return worker

    def give(self, worker: int, job: Job) -> None:
        self.clock.now += self.world.driver_s
        now = self.clock.now
        self.spent.seconds["waiting for the driver"] += now - self._idle_since.pop(worker)
        relative, slow_factor = next(self._draws)
        work_s = self.world.shard_s * relative * len(job.rows) / job.task.num_rows
        store_s = self._store_s(now)
        end = now + work_s * slow_factor + store_s
        if job.suffix:
            self._copied.add(job.task.index)
            self.spent.num_copies += 1
        if self._ends_at[worker] < end:
            self.spent.num_lost += 1
            self.spent.seconds["work of lost workers"] += max(0.0, self._ends_at[worker] - now)
            return
        straggling_s = work_s * (slow_factor - 1.0)
        self._in_hand[worker] = _InHand(now, job.task.index, work_s, straggling_s, store_s)
        self._push(end, Done(worker, None if job.probe else record_of(job.task)))

    def wait(self, timeout_s: float | None) -> Sequence[Event]:
        until = np.inf if timeout_s is None else self.clock.now + timeout_s
        while self._heap and self._heap[0][0] <= until:
            when, _, event = heapq.heappop(self._heap)
            if event.worker in self._ends_at:  # nothing is heard of one that was ended
                self.clock.now = max(self.clock.now, when)
                if not isinstance(event, Lost):
                    self._idle_since[event.worker] = when
                if isinstance(event, Done):
                    self._count(self._in_hand.pop(event.worker))
                return [event]
        assert timeout_s is not None, "nothing would ever happen"
        self.clock.now = until
        return []

    def end(self, worker: int) -> None:
        del self._ends_at[worker]
        self._idle_since.pop(worker, None)
        if (stopped := self._in_hand.pop(worker, None)) is not None:  # the other one was faster
            self.spent.seconds["second copies"] += self.clock.now - stopped.since

    def commit(self, job: Job, record: ShardRecord) -> None:
        """Nothing is written."""

    def drop(self, job: Job) -> None:
        """Nothing was written."""

    def _count(self, done: _InHand) -> None:
        """Of two that make one shard the first one's time was well spent."""
        seconds = self.spent.seconds
        if done.index in self._made:
            seconds["second copies"] += done.work_s + done.straggling_s + done.store_s
            return
        if done.index in self._copied:
            self._made.add(done.index)
        seconds["the teacher"] += done.work_s
        seconds["stragglers"] += done.straggling_s
        seconds["the object store"] += done.store_s

    def _push(self, when: float, event: Event) -> None:
        self._num_pushed += 1
        heapq.heappush(self._heap, (when, self._num_pushed, event))

    def _draw(self) -> Iterator[tuple[float, float]]:
        while True:
            relative = self._random.choice(self.world.relative_S, DRAWS_AT_ONCE)
            is_slow = self._random.random(DRAWS_AT_ONCE) < self.world.slow_fraction
            factors = np.where(is_slow, self.world.slow_factor, 1.0)
            yield from zip(relative.tolist(), factors.tolist(), strict=True)

    def _store_s(self, now: float) -> float:
        """Return what a shard's requests take, one after another; they queue at the prefix."""
        store = self.world.store
        if store is None:
            return 0.0
        count = store.gets + store.puts
        self.spent.num_requests += count
        queued_s = self._gets.wait_s(now, store.gets) + self._puts.wait_s(now, store.puts)
        return queued_s + count * store.latency_s + self.world.shard_bytes / store.bytes_a_second


def record_of(task: Task) -> ShardRecord:
    return ShardRecord(
        name=task.name,
        split=task.split,
        num_rows=task.num_rows,
        num_tokens=0,
        num_positions=0,
        num_bytes=0,
        sha256="0" * 64,
    )


def unheard(line: str) -> None:
    """Hear a warning and do nothing: lost workers are counted."""
