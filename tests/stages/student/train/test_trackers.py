"""Trackers of a run: TensorBoard's files read back, runs that are resumed, missing packages."""

import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pipeline.executors.local.training import train_in_processes
from pipeline.executors.training_job import TrainingJob
from pipeline.steps import run as run_module
from pipeline.steps.run import run_plan
from schemas.errors import ConfigError
from schemas.storage.files import as_folder
from stages.student import packages
from stages.student.objectives.kd import KdConfig
from stages.student.options import TENSORBOARD_FOLDER, TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import TrainResult, train
from tests.fixtures.cached_data import CachedData, make_cached_data
from tests.fixtures.tiny_recipe import Events, TinyRecipe, error_of, make_recipe, teachercache

OPTIONS = TrainOptions(
    num_workers=0, log_every=1, checkpoint_every=3, report_to=("tensorboard",), run_name="named"
)
CONFIG = TrainConfig(max_steps=8, lr=3e-3, per_device_batch_size=4, objective=KdConfig(weight=0.5))


@pytest.fixture(autouse=True)
def no_place_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TENSORBOARD_FOLDER, raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


def run(
    data: CachedData, output: Path, options: TrainOptions = OPTIONS, **more: Any
) -> TrainResult:
    tables = data.tables("threshold")
    return train(CONFIG, student=data.student, data=tables, output=output, options=options, **more)


def events_of(folder: Path) -> Iterator[Event]:
    """Records of TFRecord files, by name: a length, its checksum, the event, its checksum."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: a session that starts at a step drops what is there from it on."""
    found: dict[str, dict[int, float]] = {}
    for event in events_of(folder):
        if event.session_log.status == SessionLog.START:
            for values in found.values():
                for step in [step for step in values if step >= event.step]:
                    del values[step]
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                values = found.setdefault(value.tag, {})
                if value.tag != "train/epoch":  # which the Trainer's summary says again
                    assert event.step not in values, f"{value.tag} twice at step {event.step}"
                values[event.step] = value.simple_value
    return found


def assert_told(folder: Path, result: TrainResult) -> None:
    """Every number of the history and of the held-out rows is there, once."""
    found = scalars_of(folder)
    names = set(result.history[0]) - {"step"}
    assert {"loss", "kl", "cross_entropy", "grad_norm", "learning_rate"} <= names
    for name in names:
        logged = {int(entry["step"]): entry[name] for entry in result.history}
        assert found[f"train/{name}"] == pytest.approx(logged, rel=1e-6)
    for name, value in result.metrics["before"].items():
        ends = {0: value, CONFIG.max_steps: result.metrics["after"][name]}
        assert found[f"eval/{name}"] == pytest.approx(ends, rel=1e-6)


@pytest.mark.slow
def test_tensorboard_is_told_what_is_logged(data: CachedData, tmp_path: Path) -> None:
    result = run(data, tmp_path / "out")
    assert_told(tmp_path / "out" / "tensorboard", result)
    record = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert not [name for name in record["files"] if "tensorboard" in name]
    untold = run(data, tmp_path / "untold", TrainOptions(num_workers=0, log_every=1))
    assert untold.fingerprint == result.fingerprint and untold.history == result.history
    assert not (tmp_path / "untold" / "tensorboard").exists()


def test_a_folder_of_ones_own_has_one_for_each_run(
    data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TENSORBOARD_FOLDER, str(tmp_path / "logs"))
    result = run(data, tmp_path / "out")
    assert_told(tmp_path / "logs" / "named", result)


class Stopped(Exception):
    """What a test throws from ``on_event`` to stop a run."""


def stop_at_six(event: dict[str, Any]) -> None:
    if event["event"] == "step" and event["step"] == 6:
        raise Stopped


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_log(data: CachedData, tmp_path: Path) -> None:
    """Steps 4 and 5, after the last whole checkpoint, are made and told again."""
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", on_event=stop_at_six)
    assert max(scalars_of(tmp_path / "out" / "tensorboard")["train/loss"]) >= 4
    (first,) = (tmp_path / "out" / "tensorboard").iterdir()
    while f".{int(time.time())}." in first.name:  # event files are named by the second
        time.sleep(0.01)
    result = run(data, tmp_path / "out")
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 2
    assert_told(tmp_path / "out" / "tensorboard", result)


@pytest.mark.slow
def test_of_several_processes_one_tells(data: CachedData, tmp_path: Path) -> None:
    job = TrainingJob(
        config=CONFIG,
        student=data.student,
        data=tuple(data.tables("threshold")),
        output=tmp_path / "out",
        fingerprint="same",
        options=OPTIONS,
    )
    train_in_processes(job, 2, lambda event: None)
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 1
    job.carry_out(lambda event: None)  # done: tells nothing
    result = run(data, tmp_path / "out", fingerprint="same")
    assert_told(tmp_path / "out" / "tensorboard", result)


@pytest.fixture
def recipe(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    steps = {
        "trained": {"stage": "train", "student": "teacher", "data": ["documents", "signals"]}
        | {"max_steps": 1}
    }
    return make_recipe(tmp_path, tiny_model, paragraphs[:12], more_steps=steps)


@pytest.mark.slow
def test_a_recipe_says_who_is_told_and_keeps_its_names(
    recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TENSORBOARD_FOLDER, str(tmp_path / "logs"))
    told = "execution.report_to=[tensorboard]"
    prints = [[step.fingerprint for step in recipe.plan(*words)] for words in ((), (told,))]
    assert prints[0] == prints[1]
    recipe.run(told)
    (run_folder,) = (tmp_path / "logs").iterdir()
    assert run_folder.name == f"trained-{prints[0][-1][:12]}"
    assert "execution.report_to" in str(error_of(recipe, "execution.report_to=[paper]"))


def test_a_package_that_is_missing_is_named_before_anything_runs(
    recipe: TinyRecipe, data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for name, package in (
        ("wandb", "wandb"),
        ("mlflow", "mlflow"),
        ("tensorboard", "tensorboardX"),
    ):
        said = teachercache("run", recipe.path, "--set", f"execution.report_to=[{name}]")
        expected = f"steps.trained: report_to: {name} needs the package {package}, which is not"
        assert said.code == 2 and said.error.startswith(expected)
        assert not recipe.root.exists()
        options = TrainOptions(num_workers=0, report_to=(name,), run_name="named")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"needs the package {package}"):
            run(data, tmp_path / "out", options)


def test_tensorboard_needs_a_place_where_the_root_is_a_store(
    recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = recipe.load("execution.report_to=[tensorboard]").execution
    step = replace(recipe.step("trained"), place=as_folder("s3://bucket/root/step"))
    monkeypatch.setattr(run_module, "is_done", lambda step: False)
    with pytest.raises(
        ConfigError, match=r"^steps.trained: report_to: tensorboard .* is in a store"
    ):
        run_plan([step], execution, Events())


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_has_one_run_that_a_resumed_one_goes_on_with(
    data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    options = replace(OPTIONS, report_to=("mlflow",))
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", options, on_event=stop_at_six)
    mlflow.end_run()
    result = run(data, tmp_path / "out", options)
    (found,) = mlflow.search_runs(output_format="list")
    assert found.info.run_name == "named" and found.info.status == "FINISHED"
    assert found.data.metrics["loss"] == pytest.approx(result.history[-1]["loss"])
    kl = result.metrics["after"]["kl_to_teacher"]
    assert found.data.metrics["eval_kl_to_teacher"] == pytest.approx(kl)


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_has_a_run_of_the_steps_name(
    data: CachedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run(data, tmp_path / "out", replace(OPTIONS, report_to=("wandb",)))
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith("-named")
    assert os.path.getsize(next(folder.glob("*.wandb"))) > 1000
