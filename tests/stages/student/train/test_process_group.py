"""How processes that trained together end: no thread of their group outlives the interpreter."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.executors.local.training import train_in_processes
from pipeline.executors.training_job import OnEvent, TrainingJob
from schemas.errors import EngineError
from stages.student.objectives.kd import KdConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from tests.fixtures.episode_data import EpisodeData, make_episode_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    return make_episode_data(tmp_path_factory.mktemp("cache"), encodings=("threshold",))


def arguments(data: EpisodeData, output: Path) -> dict[str, Any]:
    config = TrainConfig(max_steps=2, per_device_batch_size=4, objective=KdConfig(weight=0.5))
    return {
        "config": config,
        "student": data.student,
        "data": tuple(data.text.tables("threshold")),
        "output": output,
        "fingerprint": "the same",
        "options": TrainOptions(num_workers=0, log_every=1, micro_batch_tokens=60),
    }


def group_threads() -> list[str]:
    """The threads of this process that serve a process group, by name."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


class SaysThreads(TrainingJob):
    """A job whose processes say which threads of a group they have while they train, and after."""

    def carry_out(self, on_event: OnEvent, **how: Any) -> None:
        def with_threads(event: dict[str, Any]) -> None:
            on_event({**event, "threads": group_threads()})

        super().carry_out(with_threads, **how)
        on_event({"event": "ended", "threads": group_threads()})


class Aborts(TrainingJob):
    """A job of which one process dies as C++ ends a process that threw where none may."""

    def carry_out(self, on_event: OnEvent, **how: Any) -> None:
        if os.environ["RANK"] == "1":
            sys.stderr.write("a warning\nterminate called after throwing an instance of 'X'\n")
            sys.stderr.write("  what():  closed by peer\n")
            sys.stderr.flush()
            os.abort()
        super().carry_out(on_event, **how)


def test_no_thread_of_the_group_is_left_when_a_process_ends(
    data: EpisodeData, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    train_in_processes(SaysThreads(**arguments(data, tmp_path / "out")), 2, events.append)
    assert any(event["threads"] for event in events if event["event"] == "step")
    ended = [event["threads"] for event in events if event["event"] == "ended"]
    assert ended == [[], []]


def test_a_process_that_aborts_is_told_with_its_last_words(
    data: EpisodeData, tmp_path: Path
) -> None:
    job = Aborts(**arguments(data, tmp_path / "out"))
    with pytest.raises(EngineError) as caught:
        train_in_processes(job, 2, lambda event: None)
    said = str(caught.value)
    assert "\n" not in said and said.startswith(
        "training process 1 died (SIGABRT: terminate called after throwing an instance of 'X' "
        "what():  closed by peer; "
    )
