"""Hand shards to workers that may die: which worker does what, and which row is to blame.

One shard at a time goes to each worker that is ready, so a slow shard holds nobody up and a lost
worker costs only the shard in hand, which another worker does again. A worker is lost when its
process or its machine dies, when its engine does, or when it exceeds the time for a shard.

A shard that has lost ``max_attempts`` workers is tried in halves, and the halves that lose theirs
in halves again, down to single rows. A row that alone loses ``max_attempts`` workers is *rejected*,
and the shard is made of all its other rows, as one unit: their bytes are those of a shard that
never had the row. They may differ in last bits from what the same rows would have become beside it,
since the engine's batches are cut otherwise; from run to run they are equal, because the same row
is found whichever worker dies first.

Nothing here knows what a worker is: processes of this machine and actors of a Ray cluster are each
a ``Crew``.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Protocol

from pipeline.executors.shard_task import ShardTasks, sample_id_at
from pipeline.executors.worker import Job
from schemas.errors import EngineError, RejectLimitError
from schemas.storage.records import ShardRecord


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has opened the stage."""

    worker: int


@dataclass(frozen=True, slots=True)
class Done:
    """The worker has done its job; no record for a probe."""

    worker: int
    record: ShardRecord | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker raised an error, and lives."""

    worker: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is gone."""

    worker: int
    why: str


Event = Ready | Done | Failed | Lost


class Crew(Protocol):
    """Workers, by number. Each has at most one job in hand."""

    def start(self) -> int:
        """Ask for one more worker; ``Ready`` follows, or ``Failed`` or ``Lost``."""

    def give(self, worker: int, job: Job) -> None:
        """Give a job to a worker that is ready and has none."""

    def wait(self, timeout_s: float | None) -> Sequence[Event]:
        """Return what has happened, at the latest (and then nothing) after ``timeout_s``."""

    def end(self, worker: int) -> None:
        """End a worker whatever it does, and free what it holds; nothing more is heard of it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many workers, how many of them a shard may cost, and how long each may take for it."""

    workers: int
    max_attempts: int
    shard_timeout_s: float | None


def dispatch(
    crew: Crew,
    tasks: ShardTasks,
    limits: Limits,
    *,
    warned: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ShardRecord]:
    """Yield each shard's record as it is finished; with no tasks, open the stage once.

    Raises what a worker raised, but for the EngineError of a job: that one is a lost worker.
    ``clock`` gives seconds that never go back, whatever the time of day is set to.
    """
    yield from _Dispatcher(crew, limits, warned, _Jobs(limits.max_attempts, tasks), clock).run()


@dataclass
class _Dispatcher:
    crew: Crew
    limits: Limits
    warned: Callable[[str], None]
    jobs: "_Jobs"
    clock: Callable[[], float]
    starting: set[int] = field(default_factory=set)
    idle: deque[int] = field(default_factory=deque)
    busy: dict[int, tuple[Job, float]] = field(default_factory=dict)  # the job, and since when
    failed_starts: int = 0  # in a row

    def run(self) -> Iterator[ShardRecord]:
        self._start_workers()
        while self.jobs.num_open or not (self.idle or self.busy):
            self._hand_out()
            for event in self.crew.wait(self._seconds_left()):
                record = self._take(event)
                if record is not None:
                    yield record
            self._end_overdue()
            self._start_workers()

    def _start_workers(self) -> None:
        wanted = min(self.limits.workers, max(1, self.jobs.num_open))
        while len(self.starting) + len(self.idle) + len(self.busy) < wanted:
            self.starting.add(self.crew.start())

    def _hand_out(self) -> None:
        while self.idle and (job := self.jobs.take()) is not None:
            worker = self.idle.popleft()
            self.busy[worker] = (job, self.clock())
            self.crew.give(worker, job)

    def _take(self, event: Event) -> ShardRecord | None:
        match event:
            case Ready(worker):
                self.starting.remove(worker)
                self.idle.append(worker)
                self.failed_starts = 0
            case Done(worker, record):
                job, _ = self.busy.pop(worker)
                self.idle.append(worker)
                self.jobs.done(job)
                return record
            case Failed(worker, error):
                if worker in self.starting or not isinstance(error, EngineError):
                    raise error
                self._lose(worker, str(error))
            case Lost(worker, why):
                self._lose(worker, why)
        return None

    def _lose(self, worker: int, why: str) -> None:
        self.crew.end(worker)
        if worker in self.busy:
            job, _ = self.busy.pop(worker)
            self.warned(f"a worker was lost on {job}: {why}")
            self.jobs.lost(job, why)
        elif worker in self.idle:
            self.idle.remove(worker)
        else:
            self.starting.remove(worker)
            self.failed_starts += 1
            # Of a thousand that start at once some may be lost to chance, all of them are not.
            if self.failed_starts >= max(self.limits.max_attempts, self.limits.workers):
                raise EngineError(
                    f"{self.failed_starts} workers in a row died before they were ready ({why}); "
                    f"finished shards are kept: lower execution.workers if memory is short, and "
                    f"run again"
                )

    def _seconds_left(self) -> float | None:
        limit_s = self.limits.shard_timeout_s
        if limit_s is None or not self.busy:
            return None
        _, first = next(iter(self.busy.values()))  # jobs are in the order they were given
        return max(0.0, first + limit_s - self.clock())

    def _end_overdue(self) -> None:
        limit_s, now = self.limits.shard_timeout_s, self.clock()
        if limit_s is None:
            return
        overdue = takewhile(lambda item: now - item[1][1] >= limit_s, self.busy.items())
        for worker, _ in list(overdue):
            self._lose(worker, f"no result within execution.shard_timeout_s {limit_s:g}")


class _Jobs:
    """What is to be done, what has been lost on it, and which rows are to blame.

    A task is made when a worker is ready for it; ``queue`` has what is tried again.
    """

    def __init__(self, max_attempts: int, tasks: ShardTasks) -> None:
        self.max_attempts = max_attempts
        self.queue: deque[Job] = deque()
        self.num_in_hand = 0
        self._tasks, self._num_untried = iter(tasks), len(tasks)
        self._losses: Counter[tuple[int, range, bool]] = Counter()
        self._suspects: dict[int, _Suspect] = {}

    @property
    def num_open(self) -> int:
        return self._num_untried + len(self.queue) + self.num_in_hand

    def take(self) -> Job | None:
        """Return the next job: first those that nobody has tried."""
        if self._num_untried:
            self._num_untried -= 1
            task = next(self._tasks)
            job = Job(task, range(task.num_rows))
        elif self.queue:
            job = self.queue.popleft()
        else:
            return None
        self.num_in_hand += 1
        return job

    def done(self, job: Job) -> None:
        self.num_in_hand -= 1
        if job.probe:
            self._judged(job)

    def lost(self, job: Job, why: str) -> None:
        """Queue the job again, or halves of it, or blame its one row."""
        self.num_in_hand -= 1
        key = (job.task.index, job.rows, job.probe)
        self._losses[key] += 1
        attempts = 1 if job.probe and len(job.rows) > 1 else self.max_attempts
        if self._losses[key] < attempts:
            self.queue.append(job)  # behind all others: they are not to wait for it
        elif not job.probe:
            self._suspect(job, why)
        elif len(job.rows) > 1:
            self._suspects[job.task.index].num_probes += 1
            self._probe_halves(job)
        else:
            self._blame(job)
            self._judged(job)

    def _suspect(self, job: Job, why: str) -> None:
        if job.task.index in self._suspects or not job.rows:
            task = job.task
            raise EngineError(
                f"{task.folder / task.name}: {self.max_attempts} workers were lost on it (last: "
                f"{why}), none on a single row that is left in it; finished shards are kept: give "
                f"a worker more memory or time, or fewer rows a shard, and run again"
            )
        self._suspects[job.task.index] = _Suspect(num_probes=2 if len(job.rows) > 1 else 1)
        self._probe_halves(job)

    def _probe_halves(self, job: Job) -> None:
        middle = len(job.rows) // 2
        for rows in (job.rows[:middle], job.rows[middle:]):
            if rows:
                self.queue.append(Job(job.task, rows, probe=True))

    def _blame(self, job: Job) -> None:
        task, deadly = job.task, self._suspects[job.task.index].deadly_rows
        deadly.append(job.rows.start)
        if len(deadly) > task.max_rejected_fraction * task.num_rows:
            raise RejectLimitError(
                f"{task.folder / task.name}: {len(deadly)} of {task.num_rows} rows were rejected, "
                f"more than max_rejected_fraction {task.max_rejected_fraction}: the engine dies on "
                f"each, first sample {sample_id_at(task, deadly[0])}"
            )

    def _judged(self, job: Job) -> None:
        """Count a probe as answered; after the last one the shard is tried again."""
        suspect = self._suspects[job.task.index]
        suspect.num_probes -= 1
        if suspect.num_probes == 0:
            task = replace(job.task, deadly_rows=tuple(sorted(suspect.deadly_rows)))
            self._losses[(task.index, range(task.num_rows), False)] = 0
            self.queue.append(Job(task, range(task.num_rows)))


@dataclass
class _Suspect:
    """A shard under examination: probes not answered yet, and rows found to end a worker."""

    num_probes: int
    deadly_rows: list[int] = field(default_factory=list)
