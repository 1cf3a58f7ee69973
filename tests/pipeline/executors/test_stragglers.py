"""Second copies of slow shards: when one is made, which of the two counts, what is left of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.executors.dispatch import Done, Event, Limits, Lost, Ready, dispatch
from pipeline.executors.shard_task import ShardTask
from pipeline.executors.worker import Job
from schemas.errors import EngineError
from schemas.storage.records import ShardRecord, commit_copy, drop_copy, read_record, write_record
from schemas.storage.shards import write_shard
from schemas.tables.documents import DOCUMENTS
from tests.fixtures.tiny_teacher import as_document

NEVER = 1e9


@dataclass
class TimedCrew:
    """Workers on a virtual clock. ``seconds`` has what a shard or its copy takes, 10 by default.

    ``dies`` are shards, or copies of them, at whose end the worker is lost instead, the first time.
    """

    seconds: dict[tuple[int, bool], float] = field(default_factory=dict)
    dies: set[tuple[int, bool]] = field(default_factory=set)
    now: float = 0.0
    given: list[tuple[float, Job]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    _due: dict[int, tuple[float, Event]] = field(default_factory=dict)
    _num_started: int = 0

    def start(self) -> int:
        self._num_started += 1
        self._due[self._num_started] = (self.now, Ready(self._num_started))
        return self._num_started

    def give(self, worker: int, job: Job) -> None:
        assert worker not in self._due and worker not in self.ended
        self.given.append((self.now, job))
        kind = (job.task.index, bool(job.suffix))
        event: Event = Done(worker, record_of(job))
        if kind in self.dies:
            self.dies.remove(kind)
            event = Lost(worker, "killed")
        self._due[worker] = (self.now + self.seconds.get(kind, 10.0), event)

    def wait(self, timeout_s: float | None) -> Sequence[Event]:
        until = NEVER if timeout_s is None else self.now + timeout_s
        first = min((when for when, _ in self._due.values()), default=NEVER)
        if first > until:
            assert timeout_s is not None, "nothing would ever happen"
            assert until > self.now, "no time passes, and nothing is done: it would wait for ever"
            self.now = until
            return []
        self.now = max(self.now, first)
        events = [event for when, event in self._due.values() if when <= self.now]
        self._due = {worker: due for worker, due in self._due.items() if due[0] > self.now}
        return events

    def end(self, worker: int) -> None:
        self.ended.append(worker)
        self._due.pop(worker, None)

    # What becomes of files, as ``CopiedFiles`` says.
    def commit(self, job: Job, record: ShardRecord) -> None:
        self.said.append(f"commit {job.task.index}")

    def drop(self, job: Job) -> None:
        self.said.append(f"drop {job.task.index}")

    def run(self, num_shards: int, workers: int, timeout_s: float | None = None) -> list[str]:
        limits = Limits(workers, max_attempts=3, shard_timeout_s=timeout_s)
        tasks = [task_of(index, num_shards) for index in range(num_shards)]
        records = dispatch(
            self, tasks, limits, warned=self.said.append, clock=lambda: self.now, files=self
        )
        return [record.name[6:11] for record in records]

    @property
    def copies(self) -> list[tuple[float, int]]:
        return [(when, job.task.index) for when, job in self.given if job.suffix]


def task_of(index: int, num_shards: int) -> ShardTask:
    place = Path("out")
    return ShardTask(place, index, num_shards, "train", place, "", 4, 1.0, {})


def record_of(job: Job) -> ShardRecord:
    return ShardRecord(
        name=job.task.name,
        split="train",
        num_rows=4,
        num_tokens=0,
        num_positions=0,
        num_bytes=0,
        sha256="0" * 64,
    )


def test_a_shard_that_takes_over_twice_as_long_is_copied_when_all_others_are_handed_out() -> None:
    crew = TimedCrew({(0, False): 100.0})
    made = crew.run(8, workers=2)
    # Worker 2 does seven shards in 70 s: shard 0 has been slow since 20 s, but only now it is idle.
    assert crew.copies == [(70.0, 0)]
    assert made == [f"{index:05d}" for index in (*range(1, 8), 0)] and crew.now == 80.0
    assert crew.said == [
        "commit 0",
        "a worker was ended over shard-00000-of-00008: a second one was done with it first",
    ]
    assert len(crew.ended) == 1


def test_an_idle_worker_waits_until_a_shard_is_slow() -> None:
    crew = TimedCrew({(5, False): 60.0})
    made = crew.run(6, workers=2)
    # The last two begin at 20 s; one ends at 30 s, the other is slow 20 s after it began.
    assert crew.copies == [(40.0, 5)] and crew.now == 50.0
    assert sorted(made) == [f"{index:05d}" for index in range(6)] and len(made) == 6


def test_it_never_waits_for_a_moment_that_it_takes_for_over() -> None:
    """As digits grow coarser ``since + slow`` may be there when ``now - since`` is not."""
    random = np.random.default_rng(0)
    for start in 2**16 - random.uniform(32.0, 45.0, 50):
        seconds = {(index, False): float(random.uniform(10.0, 11.0)) for index in range(12)}
        crew = TimedCrew(seconds | {(11, False): 1000.0}, now=float(start))
        assert len(crew.run(12, workers=3)) == 12
        assert [index for _, index in crew.copies] == [11]


def test_a_copy_that_comes_second_is_dropped_and_its_worker_ended_with_the_run() -> None:
    crew = TimedCrew({(5, False): 25.0, (5, True): 50.0})
    made = crew.run(6, workers=2)
    assert crew.copies == [(40.0, 5)] and crew.now == 45.0
    assert made.count("00005") == 1 and len(made) == 6
    assert crew.said == ["drop 5"] and len(crew.ended) == 1


def test_both_at_the_same_moment_are_one_shard() -> None:
    crew = TimedCrew({(5, False): 30.0, (5, True): 10.0})
    made = crew.run(6, workers=2)
    assert made.count("00005") == 1 and len(made) == 6
    assert crew.said[0] in ("commit 5", "drop 5")


def test_a_shard_is_copied_once_even_if_its_copy_is_lost() -> None:
    crew = TimedCrew({(5, False): 200.0}, dies={(5, True)})
    made = crew.run(6, workers=2)
    assert len(crew.copies) == 1 and crew.now == 220.0
    assert made.count("00005") == 1 and crew.said == ["drop 5"]


def test_a_shard_that_is_lost_is_tried_again_alone() -> None:
    """Whether a row ends its workers is found out with one worker at a time."""
    crew = TimedCrew({(5, False): 40.0, (5, True): 300.0}, dies={(5, False)})
    made = crew.run(6, workers=2)
    assert crew.copies == [(40.0, 5)] and made.count("00005") == 1
    assert crew.said == ["a worker was lost on shard-00005-of-00006: killed", "drop 5"]
    again = [when for when, job in crew.given if job.task.index == 5 and not job.suffix]
    assert again == [20.0, 60.0]


def test_nothing_is_copied_while_too_little_is_known_or_all_take_alike() -> None:
    few = TimedCrew({(1, False): 500.0})
    few.run(3, workers=2)
    assert few.copies == []
    short = TimedCrew({(index, False): 0.1 for index in range(6)} | {(5, False): 9.0})
    short.run(6, workers=2)
    assert short.copies == []
    alike = TimedCrew()
    alike.run(40, workers=7)
    assert alike.copies == []


def test_a_time_limit_ends_a_shard_and_its_copy() -> None:
    crew = TimedCrew({(5, False): NEVER, (5, True): NEVER})
    with pytest.raises(EngineError, match="3 workers were lost on it"):
        crew.run(6, workers=2, timeout_s=100.0)
    assert len(crew.copies) == 1 and "drop 5" in crew.said


@pytest.fixture
def shard(tmp_path: Path) -> ShardRecord:
    """A record; the shard it is about lies in ``tmp_path`` under a temporary name, as it does."""
    name, suffix = "shard-00000-of-00001", ".tmp-0123456789ab"
    rows = [as_document(np.array([1, 2, 3]))]
    file = write_shard(tmp_path / f"{name}.arrow{suffix}", DOCUMENTS.bind(vocab_size=512), rows)
    record = replace(
        record_of(Job(task_of(0, 1), range(1))),
        num_rows=1,
        num_bytes=file.num_bytes,
        sha256=file.sha256,
        rejects={"too long": 1},
    )
    (tmp_path / f"{name}.rejects.jsonl{suffix}").write_text("{}\n")
    write_record(tmp_path, record, {}, suffix=suffix)
    return record


def test_a_copy_is_no_shard_until_it_is_committed(tmp_path: Path, shard: ShardRecord) -> None:
    assert read_record(tmp_path, shard.name) is None
    commit_copy(tmp_path, shard, ".tmp-0123456789ab")
    assert read_record(tmp_path, shard.name) == shard
    ends = (".arrow", ".json", ".rejects.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{shard.name}{end}" for end in ends]


def test_a_copy_that_is_dropped_leaves_nothing(tmp_path: Path, shard: ShardRecord) -> None:
    drop_copy(tmp_path, shard.name, ".tmp-0123456789ab")
    assert list(tmp_path.iterdir()) == []
    drop_copy(tmp_path, shard.name, ".tmp-0123456789ab")
