"""Training in several processes of one machine: one run's numbers, one run's manners."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from pipeline.executors.local.training import train_in_processes
from pipeline.executors.training_job import TrainingJob
from schemas.errors import EngineError, StoreError
from schemas.tables.documents import DOCUMENTS
from stages.models.checkpoints.checkpoint import (
    CHECKPOINTS,
    CheckpointRecord,
    last_checkpoint,
    read_checkpoint,
)
from stages.student.objectives.icl_distillation import IclDistillationConfig
from stages.student.objectives.kd import KdConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from tests.fixtures.cached_data import VOCAB_SIZE, make_documents, write_table
from tests.fixtures.episode_data import EpisodeData, make_episode_data
from tests.fixtures.machine_speed import slowness
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    edit_recipe,
    finish,
    make_recipe,
    start,
    teachercache,
)
from tests.pipeline.test_cli import STUDENTS

KD = TrainConfig(
    max_steps=10,
    lr=3e-3,
    per_device_batch_size=4,
    objective=KdConfig(weight=0.5),
)
ICL = KD.model_copy(update={"max_steps": 4, "objective": IclDistillationConfig(lm_weight=0.2)})
# The order of summation differs between numbers of processes, by no more than this.
LOSS_TOLERANCE = 1e-5
KILL_AT, LAST_WHOLE = 7, 6  # a checkpoint every 2 steps
Events = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test's own process has, so that no sum is taken in another order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EpisodeData:
    return make_episode_data(tmp_path_factory.mktemp("cache"), encodings=("threshold",))


def job_of(data: EpisodeData, config: TrainConfig, output: Path) -> TrainingJob:
    text = tuple(data.text.tables("threshold"))
    in_context = isinstance(config.objective, IclDistillationConfig)
    return TrainingJob(
        config=config,
        student=data.student,
        data=tuple(data.icl) if in_context else text,
        lm_data=text if in_context else (),
        output=output,
        fingerprint="the same",
        options=TrainOptions(num_workers=0, log_every=1, checkpoint_every=2, micro_batch_tokens=60),
    )


def carry_out(
    job: TrainingJob, processes: int, then: Callable[[int], None] = lambda step: None
) -> Events:
    """Run a job; ``then`` is called with the number of each step that is done."""
    events: Events = []

    def on_event(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "step":
            then(event["step"])

    if processes == 1:
        job.carry_out(on_event)
    else:
        train_in_processes(job, processes, on_event)
    return events


def record_of(job: TrainingJob) -> CheckpointRecord:
    record = read_checkpoint(job.output)
    assert record is not None
    return record


def assert_same_run(job: TrainingJob, other: TrainingJob) -> None:
    """Every step read the same rows and had the same losses, and what came of it is the same."""
    one, two = record_of(job), record_of(other)
    assert (one.fingerprint, one.identity) == (two.fingerprint, two.identity)
    assert sorted(one.files) == sorted(two.files)
    for here, there in zip(one.history, two.history, strict=True):
        for name in ("step", "epoch", "num_tokens", "num_samples", "learning_rate"):
            assert there[name] == here[name]
        assert there == pytest.approx(here, rel=LOSS_TOLERANCE)
    assert two.metrics["after"] == pytest.approx(one.metrics["after"], rel=1e-4)
    weights = [load_file(each.output / "model.safetensors") for each in (job, other)]
    for name, tensor in weights[0].items():
        assert float((tensor - weights[1][name]).abs().max()) < KD.lr / 100, name


def ranks_below(pid: int) -> dict[int, psutil.Process]:
    """The training processes that ``pid`` has started, by rank."""
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "pipeline.executors.local.training_rank" in child.cmdline() and child.ppid() == pid:
                found[int(child.environ()["RANK"])] = child
        except psutil.NoSuchProcess:
            continue
    return found


class Stopped(Exception):
    """What a test throws to stop a run of one process."""


@pytest.fixture(scope="module")
def whole(data: EpisodeData, tmp_path_factory: pytest.TempPathFactory) -> dict[int, TrainingJob]:
    """The same job, undisturbed, on one process and on two."""
    folder = tmp_path_factory.mktemp("whole")
    jobs = {n: job_of(data, KD, folder / str(n)) for n in (1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        events = {n: carry_out(job, n) for n, job in jobs.items()}
    names = [[(event["event"], event.get("step")) for event in events[n]] for n in (1, 2)]
    assert names[0] == names[1]  # one run, whoever carries it out
    return jobs


@pytest.fixture(scope="module")
def killed(data: EpisodeData, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """A run of two processes of which one was killed after step 7."""
    job = job_of(data, KD, tmp_path_factory.mktemp("killed") / "out")

    def kill(step: int) -> None:
        if step == KILL_AT:
            ranks_below(os.getpid())[1].kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(EngineError, match=r"training process 1 died \(SIGKILL") as caught:
            carry_out(job, 2, kill)
    assert caught.value.exit_code == 70 and "\n" not in str(caught.value)
    assert ranks_below(os.getpid()) == {}  # the other one did not stay behind
    assert read_checkpoint(job.output) is None
    return job


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(whole: dict[int, TrainingJob]) -> None:
    assert_same_run(whole[1], whole[2])


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_in_context(data: EpisodeData, tmp_path: Path) -> None:
    jobs = [job_of(data, ICL, tmp_path / str(processes)) for processes in (1, 2)]
    for processes, job in enumerate(jobs, start=1):
        carry_out(job, processes)
    assert_same_run(*jobs)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_a_run_goes_on_after_a_killed_rank(
    whole: dict[int, TrainingJob], killed: TrainingJob, tmp_path: Path, processes: int
) -> None:
    """From the last whole checkpoint; on as many processes to the last bit."""
    output = tmp_path / "out"
    job = replace(killed, output=output)
    shutil.copytree(str(killed.output), output)
    checkpoint = last_checkpoint(output / CHECKPOINTS)
    assert checkpoint is not None  # one more may have been written before the signal came
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert step in (LAST_WHOLE, LAST_WHOLE + 2)
    events = carry_out(job, processes)
    assert events[1] == {"event": "start", "step": step, "max_steps": 10}
    assert_same_run(whole[1], job)
    if processes == 2:
        assert record_of(job).history == record_of(whole[2]).history


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(
    data: EpisodeData, whole: dict[int, TrainingJob], tmp_path: Path
) -> None:
    job = job_of(data, KD, tmp_path / "out")

    def stop(step: int) -> None:
        if step == KILL_AT:
            raise Stopped

    with pytest.raises(Stopped):
        carry_out(job, 1, stop)
    events = carry_out(job, 2)
    assert events[1] == {"event": "start", "step": LAST_WHOLE, "max_steps": 10}
    assert_same_run(whole[1], job)


@pytest.mark.slow
def test_an_error_in_one_process_is_the_error_of_the_run(data: EpisodeData, tmp_path: Path) -> None:
    """One document lacks a token that its name is a hash of: only who reads it can say so."""
    documents = make_documents()
    assert documents[4].split == "train"
    documents[4] = replace(documents[4], input_ids_T=documents[4].input_ids_T[:-1])
    bound = DOCUMENTS.bind(vocab_size=VOCAB_SIZE)
    write_table(tmp_path / "documents", bound, documents, data.text.teacher)
    job = job_of(data, KD, tmp_path / "out")
    options = replace(job.options, num_workers=1)
    job = replace(job, data=(tmp_path / "documents", job.data[1]), options=options)
    with pytest.raises(StoreError, match=rf"sample {documents[4].sample_id}\): .*[^\n]$") as caught:
        carry_out(job, 2)
    assert "\n" not in str(caught.value)
    assert ranks_below(os.getpid()) == {}


def recipe_in(folder: Path, model: Path, paragraphs: list[str]) -> TinyRecipe:
    """A recipe with a student to train; nothing is made yet."""
    recipe = make_recipe(folder, model, paragraphs[:40], more_steps=STUDENTS)
    edit_recipe(recipe, "steps", "distilled", "max_steps", value=5)  # the fifth is logged
    return recipe


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyRecipe, str]:
    """A recipe whose student the command trained on two processes, and what that printed."""
    recipe = recipe_in(tmp_path_factory.mktemp("finished"), tiny_model, paragraphs)
    said = teachercache("run", recipe.path, "--set", "execution.training_processes=2")
    assert (said.code, said.err) == (0, "")
    return recipe, said.out


@pytest.mark.slow
def test_a_recipe_trains_on_two_processes_and_lies_where_it_always_lies(
    finished: tuple[TinyRecipe, str],
) -> None:
    recipe, out = finished
    for words in (
        "[distilled] before: tokens",
        "[distilled] 5/5 steps, loss",
        "[distilled] after: tokens",
        "student, untrained",
    ):
        assert out.count(words) == 1, f"{words!r} in:\n{out}"
    said = teachercache("train", recipe.path, "--step", "distilled")  # on one process
    assert f"done already (train): its checkpoint is complete, {recipe.root}" in said.out
    verified = teachercache("verify", recipe.root)
    assert verified.code == 0, verified.out


def test_a_step_that_cannot_be_divided_is_refused_before_anything_is_made(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, tiny_model, paragraphs)
    said = teachercache("run", recipe.path, "--set", "execution.training_processes=3")
    assert said.code == 2
    assert said.error == (
        "steps.distilled: a step of 4 x 1 = 4 rows (per_device_batch_size x "
        "gradient_accumulation_steps) cannot be divided over 3 processes: take a number of "
        "processes that divides it"
    )
    assert not recipe.root.exists()


@pytest.mark.slow
def test_a_loss_that_diverges_is_one_line(finished: tuple[TinyRecipe, str]) -> None:
    changes = ("--set", "steps.distilled.lr=1e30", "--set", "steps.distilled.max_steps=9")
    recipe = finished[0]
    said = teachercache("train", recipe.path, "--step", "distilled", "--nproc", "2", *changes)
    assert said.code == 2
    assert said.error.startswith("the loss is nan at step ")


@pytest.mark.slow
@pytest.mark.parametrize("killed_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_training_processes_end_with_their_run(
    finished: tuple[TinyRecipe, str], tmp_path: Path, killed_by: signal.Signals
) -> None:
    recipe = finished[0].copy(tmp_path)
    more = "steps.distilled.max_steps=100000"
    command = ["train", recipe.path, "--step", "distilled", "--nproc", "2", "--set", more]
    process = start(*map(str, command), OMP_NUM_THREADS="1")
    folder = recipe.step("distilled", more).folder
    wait_until(lambda: (folder / CHECKPOINTS / "checkpoint-200").is_dir(), process)
    ranks = ranks_below(process.pid)
    loaders = [child for rank in ranks.values() for child in rank.children()]
    assert len(ranks) == 2 and len(loaders) == 2
    os.killpg(process.pid, killed_by)
    said = finish(process)
    _, alive = psutil.wait_procs([*ranks.values(), *loaders], timeout=10 * slowness())
    assert alive == []
    interrupted = (
        130,
        "interrupted: finished shards and checkpoints are kept, run again to go on\n",
    )
    expected = interrupted if killed_by == signal.SIGINT else (-killed_by, "")
    assert (said.code, said.err) == expected  # as one process would end


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
