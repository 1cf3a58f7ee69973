"""Machines of a Ray cluster that are lost in the middle of a run, and the run after it."""

import shutil
import subprocess
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from pipeline.executors.dispatch import Limits
from pipeline.executors.ray_cluster.shards import HEAD_TIMEOUT_S, run_on_ray
from schemas.errors import EngineError
from tests.fixtures.faulty_stage import Shards
from tests.fixtures.machine_speed import slowness
from tests.fixtures.tiny_recipe import TinyRecipe, finish, make_recipe, start, table_bytes
from tests.servers.ray_cluster import (
    ENVIRONMENT,
    another_machine,
    kill_machine,
    one_client_at_a_time,
    ray_cluster,
)

pytestmark = pytest.mark.slow
TWO = Limits(workers=2, max_attempts=3, shard_timeout_s=None)
THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (*ENVIRONMENT.items(), ("TEACHERCACHE_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """A recipe that one process ran from beginning to end."""
    recipe = make_recipe(tmp_path_factory.mktemp("finished"), tiny_model, paragraphs[:60])
    said = finish(start("run", recipe.path, **THREADS))
    assert said.code == 0, said.err
    return recipe


def kill_at_work(marks: Path, node: "subprocess.Popen[bytes]", gate: Path) -> threading.Thread:
    """Lose ``node`` when a worker of it has begun a shard, which is held; let others pass then."""

    def watch() -> None:
        while not begun() & started():
            time.sleep(0.01)
        kill_machine(node)
        gate.touch()

    def begun() -> set[int]:
        return {int(mark.name.split("-")[0]) for mark in marks.iterdir()}

    def started() -> set[int]:
        return {child.pid for child in psutil.Process(node.pid).children(recursive=True)}

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_lost_machine_costs_the_shard_in_hand_there(finished: TinyRecipe, tmp_path: Path) -> None:
    """Two machines of one core, so one worker on each; the one that is left does the rest."""
    documents = finished.step("documents").folder
    alone = Shards(documents, tmp_path / "alone", tmp_path / "alone marks")
    list(alone.run_local(alone.stage(), Limits(1, 1, None)))
    shards = Shards(documents, tmp_path / "out", tmp_path / "marks")
    with (
        ray_cluster(num_cpus=1, num_gpus=0, env=THREADS, takes_jobs=False) as cluster,
        another_machine(cluster, num_cpus=1) as machine,
    ):
        gate = tmp_path / "gate"
        held = tuple(shards.sample_ids(task)[0] for task in shards.tasks)
        thread = kill_at_work(shards.marks, machine, gate)
        records = list(
            run_on_ray(
                shards.stage(held=held, gate=gate),
                shards.context,
                shards.tasks,
                TWO,
                address=cluster.address,
                warned=shards.warnings.append,
            )
        )
        thread.join()
    assert len(records) == len(shards.tasks) and shards.bytes() == alone.bytes()
    (line,) = shards.warnings
    assert line.startswith("a worker was lost on shard-")
    assert len(list(shards.marks.iterdir())) == len(shards.tasks) + 1  # one was begun twice


@pytest.mark.parametrize("as_client", [False, True])
def test_a_lost_head_is_one_line_and_the_next_run_goes_on_without_ray(
    finished: TinyRecipe, tmp_path: Path, as_client: bool
) -> None:
    recipe = finished.copy(tmp_path)
    folder = recipe.step("signals").folder
    shutil.rmtree(folder)
    with (
        one_client_at_a_time() if as_client else nullcontext(),
        ray_cluster(num_cpus=2, num_gpus=0, env=THREADS, takes_jobs=False) as cluster,
    ):
        address = cluster.client_address if as_client else cluster.address
        values = ("executor=ray", f"address={address}", "workers=2")
        arguments = [word for value in values for word in ("--set", f"execution.{value}")]
        process = start("run", recipe.path, *arguments, **THREADS)
        wait_for_a_record(folder, process)
        kill_machine(cluster.head)
        began = time.monotonic()
        said = finish(process)
    assert said.code == EngineError.exit_code == 70, said.out + said.err
    assert time.monotonic() - began < (HEAD_TIMEOUT_S + 60) * slowness()
    assert f"the head of the Ray cluster at {address} is lost" in said.err
    assert "Traceback" not in said.err
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}
    assert kept and not (folder / "manifest.json").exists()
    said = finish(start("run", recipe.path, **THREADS))
    assert said.code == 0, said.err
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert table_bytes(folder) == table_bytes(finished.step("signals").folder)


def wait_for_a_record(folder: Path, process: "subprocess.Popen[str]") -> None:
    while not list(folder.glob("shard-*.json")):
        assert process.poll() is None, finish(process)
        time.sleep(0.002)
