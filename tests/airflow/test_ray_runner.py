"""Runner ``ray`` on a real Ray head: jobs by REST, found again after the death of their task."""

import json
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import AirflowFailException
from conftest import DAGS, PYTHON, REPOSITORY, World, tables
from teachercache_command import Call
from teachercache_runners import RayJobOperator, ray_token

TOKEN = "fedcba9876543210" * 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder in which a Ray has left its token."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    return folder


@pytest.fixture(scope="module")
def ray(home: Path) -> Iterator[str]:
    """Where a Ray head takes jobs of those who show the token."""
    head = subprocess.Popen(
        [str(PYTHON), str(Path(__file__).with_name("ray_head.py"))],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert head.stdin is not None and head.stdout is not None
    try:
        yield head.stdout.readline().strip()
    finally:
        head.stdin.close()
        head.wait(60)


@pytest.fixture(autouse=True)
def address(ray: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHERCACHE_RAY_ADDRESS", ray)
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def client(ray: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=ray, headers=headers, trust_env=False, timeout=600) as client:
        yield client


def jobs(client: httpx.Client) -> dict[str, dict[str, Any]]:
    found = client.get("/api/jobs/").raise_for_status().json()
    return {job["submission_id"]: job for job in found}


def context_of(task: str) -> Any:
    return {"ti": SimpleNamespace(dag_id="d", run_id="r", task_id=task, map_index=-1)}


def test_the_steps_of_a_run_are_ray_jobs_and_the_bytes_are_those_of_a_plain_run(
    client: httpx.Client, recipes: Path, world: World, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    schedule = {"runner": "ray", "retries": 0}
    world.write(recipes / "tiny.yaml", root, schedule=schedule)
    run = DagBag(str(DAGS)).dags["tiny__cache"].test(run_conf={"date": "2026-01-05"})
    assert run.state == "success"
    assert tables(root) == world.plain_run("2026-01-05")
    found = [job["entrypoint"] for job in jobs(client).values()]
    assert len(found) == 3 and sum("--shards 0:" in entrypoint for entrypoint in found) == 1
    assert {job["status"] for job in jobs(client).values()} == {"SUCCEEDED"}


class Following(RayJobOperator):
    """Leaves a file when it begins to follow a job."""

    gate: Path

    def _follow(self, client: httpx.Client, job: str) -> None:
        self.gate.touch()
        super()._follow(client, job)


def test_a_job_that_a_killed_task_left_behind_is_followed_and_not_run_twice(
    client: httpx.Client, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The job of that name is there and running: it says a word only after the task looks."""
    recipe = world.write(tmp_path / "tiny.yaml", tmp_path / "root")
    task = Following(task_id="again", recipe=str(recipe), arguments=["run"])
    task.gate = tmp_path / "gate"
    call = Call(str(recipe), "2026-01-05", ())
    left = f"{task.stem(call, context_of('again'))}-0"
    entrypoint = f"sh -c 'until [ -e {task.gate} ]; do sleep 0.1; done; echo it went on'"
    job = {"entrypoint": entrypoint, "submission_id": left}
    client.post("/api/jobs/", json=job).raise_for_status()
    before = set(jobs(client))
    with caplog.at_level(logging.INFO):
        task.carry_out(call, context_of("again"))
    assert set(jobs(client)) == before and jobs(client)[left]["status"] == "SUCCEEDED"


def test_a_job_that_fails_for_good_fails_the_task_with_its_line(
    world: World, tmp_path: Path
) -> None:
    recipe = world.write(tmp_path / "tiny.yaml", tmp_path / "root")
    task = RayJobOperator(task_id="bad", recipe=str(recipe), arguments=["run", "--step", "none"])
    with pytest.raises(AirflowFailException, match=r"^'none' is no step; .* \(exit code 2\)$"):
        task.carry_out(Call(str(recipe), "2026-01-05", ()), context_of("bad"))


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({"HOME": "/none"}, "{} asks for a token and there is none here: set RAY_AUTH_TOKEN, or"),
        ({"RAY_AUTH_TOKEN": " "}, "{} asks for a token and there is none here: set RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "wrong"}, "{} asks for a token, and the one here is another: it is"),
        ({"RAY_AUTH_MODE": "disabled"}, "{} asks for a token, and RAY_AUTH_MODE is disabled here"),
        ({"RAY_AUTH_TOKEN_PATH": "/none"}, "the file that RAY_AUTH_TOKEN_PATH names, /none, is e"),
    ],
)
def test_a_token_that_is_not_here_fails_the_task_at_once_and_in_one_line(
    ray: str, env: dict[str, str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    task = RayJobOperator(task_id="t", recipe=str(tmp_path / "r.yaml"), arguments=["run"])
    with pytest.raises(AirflowFailException) as error:
        task.carry_out(Call(str(tmp_path / "r.yaml"), "2026-01-05", ()), context_of("t"))
    assert str(error.value).startswith(problem.format(f"the Ray cluster at {ray}"))


def test_the_token_is_looked_for_in_rays_own_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what Ray itself finds, in a process of the worker's environment."""
    named = tmp_path / "token"
    named.write_text(" of the path \n")
    cases: list[dict[str, str]] = [
        {},
        {"HOME": "/none"},
        {"RAY_AUTH_TOKEN": ""},
        {"RAY_AUTH_TOKEN": " told ", "RAY_AUTH_TOKEN_PATH": str(named)},
        {"RAY_AUTH_TOKEN_PATH": str(named)},
        {"RAY_AUTH_TOKEN_PATH": ""},
        {"RAY_AUTH_TOKEN": " ", "RAY_AUTH_TOKEN_PATH": str(named)},
    ]
    ours = []
    for case in cases:
        with monkeypatch.context() as patch:
            for name, value in case.items():
                patch.setenv(name, value)
            ours.append(ray_token() or "")
    found = subprocess.run(
        [str(PYTHON), "-c", RAYS_OWN, json.dumps(cases)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ours == json.loads(found.stdout)
    assert ours == [TOKEN, "", TOKEN, "told", "of the path", TOKEN, ""]


RAYS_OWN = """
import json, os, sys
from ray._raylet import AuthenticationTokenLoader
loader, before, found = AuthenticationTokenLoader.instance(), dict(os.environ), []
for case in json.loads(sys.argv[1]):
    os.environ.update(case)
    loader.reset_cache()
    found.append(loader.get_raw_token(ignore_auth_mode=True))
    for name in case:
        os.environ.pop(name)
    os.environ.update(before)
print(json.dumps(found))
"""
