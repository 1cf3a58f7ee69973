"""Training on a real Ray cluster of this machine: the numbers of one process, and its errors."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline.executors.ray_cluster.training import train_on_ray
from schemas.errors import ConfigError, EngineError, StoreError
from schemas.tables.documents import DOCUMENTS
from stages.models.checkpoints.checkpoint import read_checkpoint
from tests.fixtures.cached_data import VOCAB_SIZE, make_documents, write_table
from tests.fixtures.episode_data import EpisodeData, make_episode_data
from tests.servers.ray_cluster import ENVIRONMENT, ray_cluster
from tests.stages.student.train.test_distributed_training import (
    KD,
    KILL_AT,
    LAST_WHOLE,
    Events,
    assert_same_run,
    carry_out,
    job_of,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    return make_episode_data(tmp_path_factory.mktemp("cache"), encodings=("threshold",))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with ray_cluster(num_cpus=2, num_gpus=0, env={}, takes_jobs=False) as cluster:
            yield cluster.address


def test_two_workers_have_the_losses_of_one_process(
    data: EpisodeData, tmp_path: Path, address: str
) -> None:
    alone, together = job_of(data, KD, tmp_path / "one"), job_of(data, KD, tmp_path / "two")
    expected = carry_out(alone, 1)
    events: Events = []
    train_on_ray(together, 2, events.append, address=address)
    assert [event["event"] for event in events] == [event["event"] for event in expected]
    assert_same_run(alone, together)


def test_a_run_that_lost_a_worker_goes_on_anywhere(
    data: EpisodeData, tmp_path: Path, address: str
) -> None:
    """Killed after step 7 on Ray, from checkpoint 6 on in one process without it."""
    whole, job = job_of(data, KD, tmp_path / "whole"), job_of(data, KD, tmp_path / "out")
    carry_out(whole, 1)

    def on_event(event: dict[str, object]) -> None:
        if (event["event"], event.get("step")) == ("step", KILL_AT):
            workers_here()[-1].kill()

    with pytest.raises(EngineError, match=r"worker \d of the Ray cluster died") as caught:
        train_on_ray(job, 2, on_event, address=address)
    assert caught.value.exit_code == 70 and "\n" not in str(caught.value)
    assert read_checkpoint(job.output) is None
    events = carry_out(job, 1)
    assert events[1]["event"] == "start" and events[1]["step"] in (LAST_WHOLE, LAST_WHOLE + 2)
    assert_same_run(whole, job)


def workers_here() -> list[psutil.Process]:
    """The processes of Ray Train's workers on this machine, which Ray names after their work."""
    everyone = psutil.process_iter(["cmdline"])
    found = [p for p in everyone if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
    assert len(found) == 2
    return found


def test_a_workers_error_is_the_error_of_the_run(
    data: EpisodeData, tmp_path: Path, address: str
) -> None:
    documents = make_documents()
    documents[4] = replace(documents[4], input_ids_T=documents[4].input_ids_T[:-1])
    bound = DOCUMENTS.bind(vocab_size=VOCAB_SIZE)
    write_table(tmp_path / "documents", bound, documents, data.text.teacher)
    job = job_of(data, KD, tmp_path / "out")
    job = replace(job, data=(tmp_path / "documents", job.data[1]))
    with pytest.raises(
        StoreError, match=rf"{documents[4].sample_id}\): sample_id does not name its"
    ):
        train_on_ray(job, 2, lambda event: None, address=address)


def test_more_processes_than_the_cluster_has_cores_are_refused(
    data: EpisodeData, tmp_path: Path, address: str
) -> None:
    """In place of a wait that never ends."""
    with pytest.raises(ConfigError, match="is 4, the Ray cluster has 2 CPUs and a process takes"):
        train_on_ray(job_of(data, KD, tmp_path / "out"), 4, lambda event: None, address=address)
