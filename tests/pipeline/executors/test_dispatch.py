"""Handing out shards: who is asked what, when a row is blamed, when the run gives up."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.executors.dispatch import Done, Event, Failed, Limits, Lost, Ready, dispatch
from pipeline.executors.shard_task import ShardTask, Task
from pipeline.executors.worker import Job
from schemas.errors import ConfigError, EngineError, RejectLimitError
from schemas.sample_id import sample_id_of
from schemas.storage.files import sha256_of
from schemas.storage.records import ShardRecord
from schemas.storage.shards import write_shard
from schemas.tables.documents import DOCUMENTS
from tests.fixtures.tiny_teacher import as_document

LIMITS = Limits(workers=2, max_attempts=3, shard_timeout_s=None)


@dataclass
class CrewOfRules:
    """Workers that answer at once by a rule: those rows of shard 0 end whoever is given one."""

    deadly: frozenset[int] = frozenset()
    crowded_at: int = 10**9
    error: Exception | None = None
    dies_at_start: bool = False
    silent: frozenset[int] = frozenset()  # workers that never answer
    given: list[Job] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    num_started: int = 0
    most_in_hand: int = 0
    now: float = 0.0
    _events: list[Event] = field(default_factory=list)
    _in_hand: set[int] = field(default_factory=set)

    def start(self) -> int:
        self.num_started += 1
        worker = self.num_started
        self._events.append(Lost(worker, "no memory") if self.dies_at_start else Ready(worker))
        return worker

    def give(self, worker: int, job: Job) -> None:
        assert worker not in self._in_hand and worker not in self.ended
        self._in_hand.add(worker)
        self.most_in_hand = max(self.most_in_hand, len(self._in_hand))
        self.given.append(job)
        if worker not in self.silent:
            self._events.append(self._answer(worker, job))

    def _answer(self, worker: int, job: Job) -> Event:
        reach = set(job.rows) - set(job.task.deadly_rows)
        if job.task.index == 0 and (reach & self.deadly or len(reach) > self.crowded_at):
            return Failed(worker, self.error) if self.error else Lost(worker, "killed")
        return Done(worker, None if job.probe else record_of(job.task))

    def wait(self, timeout_s: float | None) -> Sequence[Event]:
        assert self._events or timeout_s is not None, "nothing would ever happen"
        if not self._events and timeout_s is not None:
            self.now += timeout_s  # time passes where nothing else does
        events, self._events = self._events, []
        self._in_hand -= {event.worker for event in events}
        return events

    def end(self, worker: int) -> None:
        self.ended.append(worker)
        self._in_hand.discard(worker)


def record_of(task: Task) -> ShardRecord:
    rows = task.num_rows - len(task.deadly_rows)
    return ShardRecord(
        name=task.name,
        split=task.split,
        num_rows=rows,
        num_tokens=0,
        num_positions=0,
        num_bytes=0,
        sha256="0" * 64,
        rejects={json.dumps(task.deadly_rows): len(task.deadly_rows)},
    )


@pytest.fixture(scope="module")
def input_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input") / "shard.arrow"
    rows = [as_document(np.array([index + 1, index + 2])) for index in range(40)]
    write_shard(path, DOCUMENTS.bind(vocab_size=512), rows)
    return path


def tasks_of(
    path: Path, num_rows: int, num_shards: int = 3, *, limit: float = 1.0
) -> list[ShardTask]:
    return [
        ShardTask(
            folder=path.parent,
            index=index,
            num_shards=num_shards,
            split="train",
            input_file=path,
            input_sha256=sha256_of(path),
            num_rows=num_rows,
            max_rejected_fraction=limit,
            made_by={},
        )
        for index in range(num_shards)
    ]


def rejected_rows(records: Sequence[ShardRecord]) -> dict[str, list[int]]:
    return {record.name: json.loads(next(iter(record.rejects))) for record in records}


@settings(deadline=None, max_examples=60)
@given(data=st.data(), num_rows=st.integers(1, 33))
def test_exactly_the_rows_that_end_workers_are_blamed(
    input_shard: Path, data: st.DataObject, num_rows: int
) -> None:
    deadly = frozenset(data.draw(st.sets(st.integers(0, num_rows - 1), max_size=3)))
    crew = CrewOfRules(deadly)
    tasks = tasks_of(input_shard, num_rows)
    records = list(dispatch(crew, tasks, LIMITS, warned=lambda line: None))
    found = rejected_rows(records)
    assert found == {task.name: sorted(deadly) if task.index == 0 else [] for task in tasks}
    levels = num_rows.bit_length()
    assert len(crew.ended) <= LIMITS.max_attempts * (1 + len(deadly)) + len(deadly) * levels
    assert crew.num_started <= LIMITS.workers + len(crew.ended)
    assert crew.most_in_hand <= LIMITS.workers


def test_a_shard_in_trouble_waits_behind_the_others(input_shard: Path) -> None:
    crew = CrewOfRules(frozenset({5}))
    records = dispatch(crew, tasks_of(input_shard, 8), LIMITS, warned=lambda line: None)
    assert [record.name[:11] for record in records] == ["shard-00001", "shard-00002", "shard-00000"]


def test_an_engine_that_says_it_died_counts_as_a_lost_worker(input_shard: Path) -> None:
    crew, said = CrewOfRules(frozenset({2}), error=EngineError("it died")), list[str]()
    records = list(dispatch(crew, tasks_of(input_shard, 4), LIMITS, warned=said.append))
    assert rejected_rows(records)["shard-00000-of-00003"] == [2]
    assert said[0] == "a worker was lost on shard-00000-of-00003: it died"
    assert said[-1] == "a worker was lost on rows 2 to 2 of shard-00000-of-00003: it died"


def test_any_other_error_ends_the_run_at_once(input_shard: Path) -> None:
    crew = CrewOfRules(frozenset({2}), error=ConfigError("wrong"))
    with pytest.raises(ConfigError, match="wrong"):
        list(dispatch(crew, tasks_of(input_shard, 4), LIMITS, warned=lambda line: None))
    assert not any(job.probe for job in crew.given)


def test_a_shard_that_is_too_much_as_a_whole_is_given_up_in_one_line(input_shard: Path) -> None:
    """Every row passes alone: no row may be rejected for it."""
    crew = CrewOfRules(crowded_at=6)
    expected = r"shard-00000-of-00003: 3 workers were lost on it \(last: killed\), none on a single"
    with pytest.raises(EngineError, match=expected):
        list(dispatch(crew, tasks_of(input_shard, 8), LIMITS, warned=lambda line: None))


def test_more_deadly_rows_than_may_be_rejected_end_the_run_before_all_are_found(
    input_shard: Path,
) -> None:
    crew = CrewOfRules(frozenset(range(32)))
    expected = r"2 of 32 rows were rejected, more than max_rejected_fraction 0.05: the engine dies"
    with pytest.raises(RejectLimitError, match=expected) as error:
        tasks = tasks_of(input_shard, 32, limit=0.05)
        list(dispatch(crew, tasks, LIMITS, warned=lambda line: None))
    first = sorted({job.rows.start for job in crew.given if job.probe and len(job.rows) == 1})[0]
    name = sample_id_of(np.array([first + 1, first + 2]))
    name = sample_id_of(np.array([first + 1, first + 2]))
    assert str(error.value).endswith(f"first sample {name}")


def test_workers_that_never_get_ready_end_the_run(input_shard: Path) -> None:
    crew = CrewOfRules(dies_at_start=True)
    with pytest.raises(EngineError, match=r"3 workers in a row died .* \(no memory\); finished"):
        list(dispatch(crew, tasks_of(input_shard, 4), LIMITS, warned=lambda line: None))


def test_a_worker_without_an_answer_is_ended_and_its_shard_done_by_another(
    input_shard: Path,
) -> None:
    crew, said = CrewOfRules(silent=frozenset({1})), list[str]()
    limits = Limits(workers=2, max_attempts=3, shard_timeout_s=60.0)
    tasks = tasks_of(input_shard, 4)
    records = list(dispatch(crew, tasks, limits, warned=said.append, clock=lambda: crew.now))
    assert len(records) == 3 and crew.ended == [1]
    assert said == [
        "a worker was lost on shard-00000-of-00003: no result within execution.shard_timeout_s 60"
    ]


def test_without_shards_the_stage_is_opened_once() -> None:
    crew = CrewOfRules()
    assert list(dispatch(crew, [], LIMITS, warned=lambda line: None)) == []
    assert (crew.num_started, crew.given) == (1, [])
