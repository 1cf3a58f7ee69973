"""Second copies of slow shards: which are made, and what becomes of the files of each.

A shard that takes far longer than the others is given to a second worker once there is nothing
else to do, and who is first has made it. A copy writes beside the shard, under temporary names.
When it comes first the slower worker is ended before the copy gets the shard's own names, so that
never two write one file; a run that is killed in between does the shard again.
"""

import uuid
from collections import deque
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Protocol

from pipeline.executors.worker import Job
from schemas.storage.records import ShardRecord, commit_copy, drop_copy

SLOW = 2.0  # times the median of the latest shards
LEAST_S = 10.0  # what is over sooner is not worth a worker's engine, and may be late by chance
_LATEST, _ENOUGH = 99, 3


class CopiedFiles(Protocol):
    """What becomes of the files of a copy."""

    def commit(self, job: Job, record: ShardRecord) -> None:
        """Make the copy the shard; nobody else writes it any more."""

    def drop(self, job: Job) -> None:
        """Delete what there is of a copy that came too late or was lost."""


class FilesOfCopies:
    """They lie in the step's folder; see ``schemas.storage.records``."""

    def commit(self, job: Job, record: ShardRecord) -> None:
        """Rename them."""
        commit_copy(job.task.folder, record, job.suffix)

    def drop(self, job: Job) -> None:
        """Delete them."""
        drop_copy(job.task.folder, job.task.name, job.suffix)


@dataclass
class Stragglers:
    """How long shards take, and which have been copied: each is at most once."""

    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_LATEST))
    _copied: set[int] = field(default_factory=set)

    def made(self, seconds: float) -> None:
        """Note how long a shard took."""
        self._seconds.append(seconds)

    @property
    def slow_s(self) -> float | None:
        """Seconds after which a shard is slow; None: too few have been made to say."""
        enough = len(self._seconds) >= _ENOUGH
        return max(LEAST_S, SLOW * median(self._seconds)) if enough else None

    def may_copy(self, job: Job) -> bool:
        """Whether a job in hand is one that a second worker could do as well."""
        return not (job.probe or job.suffix or job.task.index in self._copied)

    def copy_of(self, job: Job) -> Job:
        """Return the job for a second worker."""
        self._copied.add(job.task.index)
        return replace(job, suffix=f".tmp-{uuid.uuid4().hex[:12]}")
