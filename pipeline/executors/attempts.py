"""Which shard is tried next, what has been lost on each, and which row is to blame.

A shard that has lost ``max_attempts`` workers is tried in halves, and the halves that lose theirs
in halves again, down to single rows. A row that alone loses ``max_attempts`` workers is *rejected*,
and the shard is made of all its other rows, as one unit: their bytes are those of a shard that
never had the row. They may differ in last bits from what the same rows would have become beside it,
since the engine's batches are cut otherwise; from run to run they are equal, because the same row
is found whichever worker dies first.
"""

from collections import Counter, deque
from dataclasses import dataclass, field, replace

from pipeline.executors.shard_task import ShardTasks, sample_id_at
from pipeline.executors.worker import Job
from schemas.errors import EngineError, RejectLimitError


class Attempts:
    """The jobs of a run. A task is made when a worker is ready for it; ``queue`` has retries."""

    def __init__(self, max_attempts: int, tasks: ShardTasks) -> None:
        """Begin with all tasks untried; each may lose so many workers."""
        self.max_attempts = max_attempts
        self.queue: deque[Job] = deque()
        self.num_in_hand = 0
        self._tasks, self._num_untried = iter(tasks), len(tasks)
        self._losses: Counter[tuple[int, range, bool]] = Counter()
        self._suspects: dict[int, _Suspect] = {}

    @property
    def num_open(self) -> int:
        """Jobs that are not done: to be given, or in hand."""
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
        """Note that a worker survived the job."""
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
