"""Hand shards to workers that may die: which worker does what, and which row is to blame.

One shard at a time goes to each worker that is ready, so a slow shard holds nobody up and a lost
worker costs only the shard in hand, which another worker does again. A worker is lost when its
process or its machine dies, when its engine does, or when it exceeds the time for a shard.

A shard that has lost several workers is tried in parts, until the row that ends them is found
(``attempts``). When nothing else is left to be handed out, shards that take far longer than the
others are given to a second worker each, and the first result counts (``stragglers``).

Nothing here knows what a worker is: processes of this machine and actors of a Ray cluster are each
a ``Crew``.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Protocol

from pipeline.executors.attempts import Attempts
from pipeline.executors.shard_task import ShardTasks
from pipeline.executors.stragglers import CopiedFiles, FilesOfCopies, Stragglers
from pipeline.executors.worker import Job
from schemas.errors import EngineError
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
    files: CopiedFiles | None = None,
) -> Iterator[ShardRecord]:
    """Yield each shard's record as it is finished; with no tasks, open the stage once.

    Raises what a worker raised, but for the EngineError of a job: that one is a lost worker.
    ``clock`` gives seconds that never go back, whatever the time of day is set to, ``files`` are
    those of second copies.
    """
    jobs, files = Attempts(limits.max_attempts, tasks), files or FilesOfCopies()
    yield from _Dispatcher(crew, limits, warned, jobs, clock, files).run()


@dataclass
class _Dispatcher:
    crew: Crew
    limits: Limits
    warned: Callable[[str], None]
    jobs: Attempts
    clock: Callable[[], float]
    files: CopiedFiles
    stragglers: Stragglers = field(default_factory=Stragglers)
    starting: set[int] = field(default_factory=set)
    idle: deque[int] = field(default_factory=deque)
    busy: dict[int, tuple[Job, float]] = field(default_factory=dict)  # the job, and since when
    failed_starts: int = 0  # in a row

    def run(self) -> Iterator[ShardRecord]:
        self._start_workers()
        while self.jobs.num_open or not (self.idle or self.busy):
            self._hand_out()
            for event in self.crew.wait(self._seconds_left()):
                record = self._take(event) if self._knows(event.worker) else None
                if record is not None:
                    yield record
            self._end_overdue()
            self._start_workers()
        for worker, (job, _) in list(self.busy.items()):
            assert job.suffix  # of a shard that is done
            self._end_copy(worker)

    def _knows(self, worker: int) -> bool:
        """Whether a worker was not ended since it was heard."""
        return worker in self.busy or worker in self.starting or worker in self.idle

    def _start_workers(self) -> None:
        wanted = min(self.limits.workers, max(1, self.jobs.num_open))
        while len(self.starting) + len(self.idle) + len(self.busy) < wanted:
            self.starting.add(self.crew.start())

    def _hand_out(self) -> None:
        while self.idle and (job := self.jobs.take()) is not None:
            self._give(job)
        slow_s = self.stragglers.slow_s if self.idle else None
        if slow_s is None:
            return
        now = self.clock()
        slow = [*takewhile(lambda item: item[1] + slow_s <= now, self.busy.values())]
        for job, _ in slow:
            if self.idle and self.stragglers.may_copy(job):
                self._give(self.stragglers.copy_of(job))

    def _give(self, job: Job) -> None:
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
                job, since = self.busy.pop(worker)
                self.idle.append(worker)
                if job.suffix:
                    return self._take_copy(job, record)
                if record is not None:
                    self.stragglers.made(self.clock() - since)
                self.jobs.done(job)
                return record
            case Failed(worker, error):
                if worker in self.starting or not isinstance(error, EngineError):
                    raise error
                self._lose(worker, str(error))
            case Lost(worker, why):
                self._lose(worker, why)
        return None

    def _take_copy(self, job: Job, record: ShardRecord | None) -> ShardRecord | None:
        """Keep a copy whose shard is still in hand, and end the worker that has it."""
        slower = self._worker_with(job.task.index, copy=False)
        if slower is None or record is None:
            self.files.drop(job)
            return None
        self.crew.end(slower)
        first, _ = self.busy.pop(slower)
        self.files.commit(job, record)
        self.warned(f"a worker was ended over {first}: a second one was done with it first")
        self.jobs.done(first)
        return record

    def _worker_with(self, index: int, *, copy: bool) -> int | None:
        """Return who has a shard in hand, or its copy."""
        return next(
            (
                worker
                for worker, (job, _) in self.busy.items()
                if job.task.index == index and not job.probe and bool(job.suffix) == copy
            ),
            None,
        )

    def _end_copy(self, worker: int) -> None:
        self.crew.end(worker)
        job, _ = self.busy.pop(worker)
        self.files.drop(job)

    def _lose(self, worker: int, why: str) -> None:
        if worker in self.busy and self.busy[worker][0].suffix:
            self._end_copy(worker)  # the shard itself is in other hands
            return
        self.crew.end(worker)
        if worker in self.busy:
            job, _ = self.busy.pop(worker)
            self.warned(f"a worker was lost on {job}: {why}")
            copier = self._worker_with(job.task.index, copy=True)
            if copier is not None:  # what is tried again is tried by one at a time
                self._end_copy(copier)
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
        """Return when the first job in hand is overdue, or slow while a worker is idle."""
        due = []
        if self.limits.shard_timeout_s is not None and self.busy:
            _, first = next(iter(self.busy.values()))  # jobs are in the order they were given
            due.append(first + self.limits.shard_timeout_s)
        if self.idle and (slow_s := self.stragglers.slow_s) is not None:
            in_hand = (since for job, since in self.busy.values() if self.stragglers.may_copy(job))
            due += [first + slow_s for first in islice(in_hand, 1)]
        return max(0.0, min(due) - self.clock()) if due else None

    def _end_overdue(self) -> None:
        limit_s, now = self.limits.shard_timeout_s, self.clock()
        if limit_s is None:
            return
        overdue = takewhile(lambda item: item[1][1] + limit_s <= now, self.busy.items())
        for worker, _ in list(overdue):
            if worker in self.busy:  # a copy goes with its shard
                self._lose(worker, f"no result within execution.shard_timeout_s {limit_s:g}")
