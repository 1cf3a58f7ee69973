"""A real Ray: the bytes of one process, whatever is killed, and one line for what cannot be.

What may go wrong with a worker is asked of both kinds: actors of Ray and processes of this machine.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.executors.dispatch import Limits
from pipeline.executors.shard_work import DEADLY
from schemas.errors import ConfigError, EngineError, SchemaMismatch
from schemas.storage.records import ShardRecord, read_record
from schemas.storage.shards import read_shard
from tests.fixtures.faulty_stage import FaultyStage, Shards
from tests.fixtures.machine_speed import slowness
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    finish,
    make_recipe,
    start,
    table_bytes,
    teachercache,
)
from tests.servers.ray_cluster import (
    ENVIRONMENT,
    Cluster,
    free_ports,
    one_client_at_a_time,
    ray_cluster,
)

os.environ.update(ENVIRONMENT)  # read by Ray when it is imported

import ray

from pipeline.executors.ray_cluster.connection import connected, head_of
from pipeline.executors.ray_cluster.shards import _ActorCrew, _Member, run_on_ray
from pipeline.executors.ray_cluster.worker_size import WorkerSize

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
NUM_PARAGRAPHS = 40
TWO = Limits(workers=2, max_attempts=3, shard_timeout_s=None)
Run = Callable[[Shards, FaultyStage, Limits], Iterator[ShardRecord]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One head for the whole file, with more CPUs than there are so that no test waits for one."""
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with ray_cluster(num_cpus=4, num_gpus=4, env=threads) as started:
        yield started


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """A recipe that one process ran from beginning to end."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder, tiny_model, paragraphs[:NUM_PARAGRAPHS])
    recipe.run()
    return recipe


@pytest.fixture
def again(finished: TinyRecipe, tmp_path: Path) -> TinyRecipe:
    """The same recipe without its signals."""
    return finished.copy(tmp_path, without="teacher_logits")


def signals(recipe: TinyRecipe) -> dict[str, bytes]:
    return table_bytes(recipe.step("signals").folder)


@pytest.fixture
def shards(finished: TinyRecipe, tmp_path: Path) -> Shards:
    return Shards(finished.step("documents").folder, tmp_path / "out", tmp_path / "marks")


@pytest.fixture
def undisturbed(shards: Shards, tmp_path: Path) -> dict[str, bytes]:
    """What one process makes of the same shards, and of all their rows."""
    own = Shards(shards.documents, tmp_path / "alone", tmp_path / "alone marks")
    one = Limits(workers=1, max_attempts=1, shard_timeout_s=None)
    assert len(list(own.run_local(own.stage(), one))) == len(own.tasks)
    return own.bytes()


@pytest.fixture(params=["ray", "local"])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param == "local":
        return lambda shards, stage, limits: shards.run_local(stage, limits)
    cluster: Cluster = request.getfixturevalue("cluster")
    return lambda shards, stage, limits: on_ray(shards, stage, limits, cluster.address)


def on_ray(
    shards: Shards,
    stage: FaultyStage,
    limits: Limits,
    address: str | None,
    *,
    start_timeout_s: float = 600.0,
    **engine: Any,
) -> Iterator[ShardRecord]:
    context = shards.context
    return run_on_ray(
        stage,
        replace(context, engine=context.engine.model_validate({"device": "cpu", **engine})),
        shards.tasks,
        limits,
        address=address,
        warned=shards.warnings.append,
        start_timeout_s=start_timeout_s,
    )


def settings(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


# The same bytes.


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_writes_the_bytes_of_one_process(
    finished: TinyRecipe, again: TinyRecipe, cluster: Cluster, workers: int
) -> None:
    events = again.run(
        "execution.executor=ray",
        f"execution.address={cluster.address}",
        f"execution.workers={workers}",
    )
    assert signals(again) == signals(finished)
    made = sorted(again.step("signals").folder.glob("shard-*.arrow"))
    assert sorted(events.made) == [path.stem for path in made]
    assert not events.warnings


def test_workers_on_ray_take_the_tau_that_one_process_finds(
    again: TinyRecipe, cluster: Cluster, tmp_path: Path
) -> None:
    encoding = "steps.signals.encoding={kind: threshold, mean_k: 9}"
    alone = again.copy(tmp_path / "alone")
    alone.run(encoding)
    on_ray = ("execution.executor=ray", f"execution.address={cluster.address}")
    again.run(encoding, *on_ray, "execution.workers=2")
    here, there = (table_bytes(each.step("signals", encoding).folder) for each in (again, alone))
    assert "calibration.json" in here and here == there


def test_through_a_client_the_bytes_are_the_same(
    shards: Shards, undisturbed: dict[str, bytes], cluster: Cluster
) -> None:
    with one_client_at_a_time():
        list(on_ray(shards, shards.stage(), TWO, cluster.client_address))
    assert shards.bytes() == undisturbed


def test_a_ray_of_its_own_from_a_folder_with_packages_of_our_names(
    finished: TinyRecipe, again: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path in the recipe means what it did, and nothing is left running."""
    user = tmp_path / "user"
    for name in ("schemas", "stages"):
        (user / name).mkdir(parents=True)
        (user / name / "__init__.py").write_text("raise SystemExit('the user has one, too')")
    monkeypatch.chdir(user)
    model = os.path.relpath(again.load().models["teacher"].folder, user)
    before = raylets()
    again.run("execution.executor=ray", "execution.workers=2", f"models.teacher.path={model}")
    assert signals(again) == signals(finished)
    assert not psutil.wait_procs(raylets() - before, timeout=20 * slowness())[1]


def raylets() -> set[psutil.Process]:
    return {p for p in psutil.Process().children(recursive=True) if p.name() == "raylet"}


def test_the_order_in_which_shards_finish_moves_no_byte(
    shards: Shards, undisturbed: dict[str, bytes], run: Run
) -> None:
    """The first shard takes until another one is finished: that one overtakes it."""
    held = tuple(shards.sample_ids(shards.tasks[0])[:1])
    gate = shards.folder / f"{shards.tasks[1].name}.json"
    records = list(run(shards, shards.stage(held=held, gate=gate), TWO))
    names = [record.name for record in records]
    assert names != sorted(names) and sorted(names) == [task.name for task in shards.tasks]
    assert shards.bytes() == undisturbed


def test_actors_run_in_the_steps_folder(shards: Shards, cluster: Cluster) -> None:
    list(on_ray(shards, shards.stage(), TWO, cluster.address))
    folders = {mark.read_text().splitlines()[0] for mark in shards.marks.iterdir()}
    assert folders == {str(shards.folder)}


# What is lost is the shard in hand.


def kill_who_holds(row: str, marks: Path, gate: Path) -> None:
    """SIGKILL whoever has begun the shard of ``row``, which is held, then let others pass."""
    while not (begun := list(marks.glob(f"*-{row}"))):
        time.sleep(0.01)
    os.kill(int(begun[0].name.split("-")[0]), signal.SIGKILL)
    gate.touch()


def test_a_killed_worker_costs_the_shard_in_hand(
    shards: Shards, undisturbed: dict[str, bytes], run: Run
) -> None:
    row, gate = shards.sample_ids(shards.tasks[2])[0], shards.marks.with_name("gate")
    killer = threading.Thread(target=kill_who_holds, args=(row, shards.marks, gate), daemon=True)
    killer.start()
    records = list(run(shards, shards.stage(held=(row,), gate=gate), TWO))
    killer.join()
    assert len(records) == len(shards.tasks) and shards.bytes() == undisturbed
    (line,) = shards.warnings
    assert line.startswith("a worker was lost on shard-")
    begun = list(shards.marks.iterdir())
    assert len(begun) == len(shards.tasks) + 1  # one shard was begun twice, no other


def test_a_killed_run_goes_on_where_it_stood(
    finished: TinyRecipe, again: TinyRecipe, cluster: Cluster
) -> None:
    on_two = ("executor=ray", f"address={cluster.address}", "workers=2")
    arguments = ["run", str(again.path), *settings(*(f"execution.{value}" for value in on_two))]
    folder = again.step("signals").folder
    process = start(*arguments, OMP_NUM_THREADS="1")
    while process.poll() is None and len(list(folder.glob("shard-*.json"))) < 2:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}
    assert not (folder / "manifest.json").exists()
    said = finish(start(*arguments, OMP_NUM_THREADS="1"))
    assert said.code == 0, said.err
    assert signals(again) == signals(finished)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert kept and "are finished already" in said.out


def test_a_worker_ten_times_slower_holds_nobody_up(
    shards: Shards, undisturbed: dict[str, bytes], run: Run
) -> None:
    """From when the other is there, too, it has a shard or two while that one takes the rest."""
    list(run(shards, shards.stage(slow_worker=True, num_shards=len(shards.tasks)), TWO))
    slow = shards.marks.with_name("slow worker").read_text()
    begun = [(m.stat().st_mtime_ns, m.name.split("-")[0] == slow) for m in shards.marks.iterdir()]
    first_of_other = min(when for when, is_slow in begun if not is_slow)
    together = [is_slow for when, is_slow in begun if when > first_of_other]
    assert len({m.name.split("-")[1] for m in shards.marks.iterdir()}) == len(shards.tasks)
    assert sum(together) <= 2 < together.count(False)
    assert shards.bytes() == undisturbed


def test_a_worker_that_is_stuck_on_a_shard_is_overtaken(
    shards: Shards, undisturbed: dict[str, bytes], run: Run
) -> None:
    """Another is given the shard too when all others are done; no time limit is needed."""
    task = shards.tasks[2]
    row = shards.sample_ids(task)[3]
    list(run(shards, shards.stage(stuck=(row,)), TWO))
    (said,) = shards.warnings
    assert said == f"a worker was ended over {task.name}: a second one was done with it first"
    stuck = int(shards.marks.with_name(row).read_text())
    assert not psutil.pid_exists(stuck) or psutil.Process(stuck).status() == "zombie"
    assert shards.bytes() == undisturbed
    (torn,) = shards.folder.glob("*.tmp-*")  # what the stuck one had begun; the next run removes it
    assert torn.name.startswith(f"{task.name}.arrow") and "json" not in torn.name
    assert read_record(shards.folder, task.name) is not None


# A row that ends every worker.


def patience_s(shards: Shards, run: Run) -> float:
    """How long two workers take now to start and do all shards: no shard of theirs takes that."""
    own = Shards(shards.documents, shards.folder / "quick", shards.folder / "quick marks")
    began = time.monotonic()
    list(run(own, own.stage(), TWO))
    return max(1.0, time.monotonic() - began)


@pytest.mark.parametrize("fault", ["deadly", "failing", "hanging"])
def test_a_row_that_ends_every_worker_is_found_and_rejected(
    shards: Shards, undisturbed: dict[str, bytes], run: Run, fault: str
) -> None:
    task = shards.tasks[1]
    row = shards.sample_ids(task)[3]
    timeout_s = patience_s(shards, run) if fault == "hanging" else None
    limits = Limits(2, max_attempts=2, shard_timeout_s=timeout_s)
    records = {r.name: r for r in run(shards, shards.stage(**{fault: (row,)}), limits)}
    assert records[task.name].rejects == {DEADLY: 1}
    assert sum(len(record.rejects) for record in records.values()) == 1
    listed = json.loads((shards.folder / f"{task.name}.rejects.jsonl").read_text())
    assert listed == {"sample_id": row, "reason": DEADLY}
    written = read_shard(shards.folder / f"{task.name}.arrow")["sample_id"].to_pylist()
    assert written == [name for name in shards.sample_ids(task) if name != row]
    changed = {name for name, body in shards.bytes().items() if undisturbed.get(name) != body}
    assert changed == {f"{task.name}.arrow", f"{task.name}.rejects.jsonl"}
    # 8 rows: twice as a whole, once in 4, once in 2, twice alone
    assert task.num_rows == 8 and len(shards.warnings) == 6


def test_an_error_of_ours_reaches_the_user_and_ends_the_run(shards: Shards, run: Run) -> None:
    """Another worker is in the middle of a shard that would take an hour."""
    row = shards.sample_ids(shards.tasks[0])[1]
    hanging = tuple(shards.sample_ids(task)[0] for task in shards.tasks[1:])
    with pytest.raises(ConfigError, match=r"^a row says that the recipe is wrong$"):
        list(run(shards, shards.stage(wrong=(row,), hanging=hanging, together=2), TWO))
    assert len(list(shards.marks.iterdir())) == 2 and not shards.warnings


# What cannot be, in one line each.


def test_an_error_in_a_worker_is_the_commands_one_line(again: TinyRecipe, cluster: Cluster) -> None:
    values = ("steps.signals.encoding={kind: top_k, k: 600}", "execution.executor=ray")
    address = f"execution.address={cluster.address}"
    said = finish(start("run", again.path, *settings(*values, address, "execution.workers=2")))
    assert said.code == 2
    assert said.error == "encoding.k is 600, the vocabulary has 512 tokens: lower k"


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_no_cluster_at_the_address(again: TinyRecipe, scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_ports(1)[0]}"
    began = time.monotonic()
    arguments = settings("execution.executor=ray", f"execution.address={address}")
    said = teachercache("run", again.path, *arguments)
    assert said.code == EngineError.exit_code == 70
    assert time.monotonic() - began < 10 * slowness()
    assert said.error.startswith(f"no Ray cluster at execution.address {address} (")
    assert "start one with `ray start --head`" in said.error


def test_what_listens_at_the_address_is_no_ray(again: TinyRecipe) -> None:
    """A Ray that is asked to connect there would wait for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        arguments = settings("execution.executor=ray", f"execution.address={address}")
        began = time.monotonic()
        said = teachercache("run", again.path, *arguments)
    assert said.code == 70 and time.monotonic() - began < 30 * slowness()
    assert "what listens there is no Ray head" in said.error


def test_more_gpus_than_any_machine_has(shards: Shards, cluster: Cluster) -> None:
    """A cluster may grow, so it is given time; a Ray of its own cannot."""
    asked: Any = {"device": "cuda", "tensor_parallel_size": 5}
    each = r"each takes 5 GPUs, \d CPUs and 1.0 GiB of one machine, "
    expected = each + r"none has been for 2 s; .* 4 GPUs"
    with pytest.raises(EngineError, match=expected):
        list(on_ray(shards, shards.stage(), TWO, cluster.address, start_timeout_s=2.0, **asked))
    expected = each + r"more than any machine has; .* 0 GPUs"
    with pytest.raises(EngineError, match=expected):
        list(on_ray(shards, shards.stage(), TWO, None, **asked))


def test_a_worker_of_several_gpus_has_them_to_itself(
    shards: Shards, undisturbed: dict[str, bytes], cluster: Cluster
) -> None:
    """Four GPUs in name: two workers of two each, in a placement group each."""
    asked: Any = {"device": "auto", "tensor_parallel_size": 2, "num_threads": 1}
    list(on_ray(shards, shards.stage(together=2), TWO, cluster.address, **asked))
    assert shards.bytes() == undisturbed
    devices = {m.name.split("-")[0]: m.read_text().splitlines()[1] for m in shards.marks.iterdir()}
    owned = sorted(index for visible in devices.values() for index in visible.split(","))
    assert len(devices) == 2 and owned == ["0", "1", "2", "3"]


def found_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the Python of workers look into ``folder`` before all others."""
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)


def test_a_worker_with_another_version_is_refused(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python finds another teachercache installed before ours."""
    other = tmp_path / "site" / "teachercache-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: teachercache\nVersion: 9.9.9\n")
    found_first(other.parent, monkeypatch)
    expected = r"^the worker on .* has teachercache 9\.9\.9, this run is \d.*: install"
    with pytest.raises(ConfigError, match=expected):
        list(on_ray(shards, shards.stage(), TWO, None))
    assert not list(shards.marks.iterdir())


OTHER_TABLE = "from schemas.tables import TABLES; TABLES['documents', ''].version = 99"


def test_a_worker_with_another_version_of_a_table_is_refused(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python finds the same teachercache, in which one table has moved on."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(OTHER_TABLE)
    found_first(tmp_path / "site", monkeypatch)
    expected = r"^the worker on .* writes table documents in version 99, this run reads version 1: "
    with pytest.raises(SchemaMismatch, match=expected):
        list(on_ray(shards, shards.stage(), TWO, None))
    assert not list(shards.marks.iterdir())


# The token that the cluster asks for.


@pytest.fixture
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a home without a token would have it; nothing else tells one."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "home" / ".ray" / "auth_token"
    file.parent.mkdir(parents=True)
    return file


MISSING = "asks for a token and there is none here: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to"
WRONG = "asks for a token, and the one here is another: it is looked for in RAY_AUTH_TOKEN, the"
UNREAD = "asks for a token, and the file that RAY_AUTH_TOKEN_PATH names, /none, is empty or cannot"
DISABLED = "asks for a token, and RAY_AUTH_MODE is disabled here: unset it, or set it to token"


@pytest.mark.parametrize(
    ("how", "token", "env", "problem"),
    [
        ("driver", None, {"RAY_AUTH_MODE": "token"}, MISSING),
        ("driver", "right", {"RAY_AUTH_MODE": "disabled"}, DISABLED),
        ("driver", "right", {"RAY_AUTH_TOKEN_PATH": "/none"}, UNREAD),
        ("driver", "right", {"RAY_AUTH_TOKEN": "wrong"}, WRONG),
        ("client", None, {}, MISSING),
        ("submit", "wrong", {}, WRONG),
    ],
)
def test_a_token_that_is_not_here_is_one_line(
    again: TinyRecipe,
    cluster: Cluster,
    token_file: Path,
    how: str,
    token: str | None,
    env: dict[str, str],
    problem: str,
) -> None:
    if token is not None:
        token_file.write_text(ENVIRONMENT["RAY_AUTH_TOKEN"] if token == "right" else token)
    place = cluster.jobs_address
    arguments = ["submit", str(again.path), "--address", place]
    if how != "submit":
        address = cluster.client_address if how == "client" else cluster.address
        place = f"execution.address {address}"
        sets = settings("execution.executor=ray", f"execution.address={address}")
        arguments = ["run", str(again.path), *sets]
    said = finish(start(*arguments, **env))
    assert said.code == ConfigError.exit_code == 2, said.err
    assert said.error.startswith(f"the Ray cluster at {place} {problem}"), said.error
    assert "Traceback" not in said.err and token_file.exists() == (token is not None)


def test_a_token_in_the_home_folder_is_shown_unasked(
    finished: TinyRecipe, again: TinyRecipe, cluster: Cluster, token_file: Path
) -> None:
    """Ray's own driver shows none to an address that it is given, unless RAY_AUTH_MODE says so."""
    token_file.write_text(f"{ENVIRONMENT['RAY_AUTH_TOKEN']}\n")
    sets = settings("execution.executor=ray", f"execution.address={cluster.address}")
    said = finish(start("run", again.path, *sets))
    assert said.code == 0, said.err
    assert signals(again) == signals(finished)


# A crowd.


def test_all_results_that_are_there_are_taken_at_once(shards: Shards, cluster: Cluster) -> None:
    """Asking Ray costs as much for one as for a hundred, and more with every worker."""
    context, size = shards.context, WorkerSize(0, 1, 0)
    with connected(cluster.address, shards.documents, num_cpus=1):
        crew = _ActorCrew(shards.stage(), context, size, 60.0, head_of(cluster.address))
        late = ray.remote(num_cpus=0)(lambda: time.sleep(3600)).remote()
        pending = [late, *(ray.put(None) for _ in range(9))]
        crew._members = {n: _Member(None, None, ref, "ready") for n, ref in enumerate(pending)}
        assert {event.worker for event in crew.wait(600.0)} == set(range(1, 10))
        ray.cancel(late, force=True)


# A run as a job of the cluster.


def test_a_submitted_recipe_runs_there_and_its_exit_code_comes_back(
    finished: TinyRecipe, again: TinyRecipe, cluster: Cluster
) -> None:
    submit = ("submit", again.path, "--address", cluster.jobs_address)
    said = finish(start(*submit, "--set", "execution.workers=2"))
    assert said.code == 0, said.err + said.out
    assert "runs recipe 'tiny' on" in said.out and "[signals] finished in" in said.out
    assert signals(again) == signals(finished)
    said = finish(start(*submit, "--set", "steps.signals.encoding={kind: top_k, k: 600}"))
    assert said.code == 2 and "error: encoding.k is 600" in said.out


def test_no_cluster_takes_jobs_at_the_address(again: TinyRecipe) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    said = teachercache("submit", again.path, "--address", address)
    assert said.code == 70 and said.error.startswith(f"no Ray cluster takes jobs at {address} (")
