"""Runner ``ray`` on a real Ray head: jobs by REST, found again after the death of their task."""

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
from teachercache_runners import RayJobOperator


@pytest.fixture(scope="module")
def ray() -> Iterator[str]:
    """Where a Ray head takes jobs."""
    head = subprocess.Popen(
        [str(PYTHON), str(Path(__file__).with_name("ray_head.py"))],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
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
def address(ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHERCACHE_RAY_ADDRESS", ray)


def jobs(ray: str) -> dict[str, dict[str, Any]]:
    found = httpx.get(f"{ray}/api/jobs/", trust_env=False).raise_for_status().json()
    return {job["submission_id"]: job for job in found}


def context_of(task: str) -> Any:
    return {"ti": SimpleNamespace(dag_id="d", run_id="r", task_id=task, map_index=-1)}


def test_the_steps_of_a_run_are_ray_jobs_and_the_bytes_are_those_of_a_plain_run(
    ray: str, recipes: Path, world: World, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    schedule = {"runner": "ray", "retries": 0}
    world.write(recipes / "tiny.yaml", root, schedule=schedule)
    run = DagBag(str(DAGS)).dags["tiny__cache"].test(run_conf={"date": "2026-01-05"})
    assert run.state == "success"
    assert tables(root) == world.plain_run("2026-01-05")
    found = [job["entrypoint"] for job in jobs(ray).values()]
    assert len(found) == 3 and sum("--shards 0:" in entrypoint for entrypoint in found) == 1
    assert {job["status"] for job in jobs(ray).values()} == {"SUCCEEDED"}


class Following(RayJobOperator):
    """Leaves a file when it begins to follow a job."""

    gate: Path

    def _follow(self, client: httpx.Client, job: str) -> None:
        self.gate.touch()
        super()._follow(client, job)


def test_a_job_that_a_killed_task_left_behind_is_followed_and_not_run_twice(
    ray: str, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The job of that name is there and running: it says a word only after the task looks."""
    recipe = world.write(tmp_path / "tiny.yaml", tmp_path / "root")
    task = Following(task_id="again", recipe=str(recipe), arguments=["run"])
    task.gate = tmp_path / "gate"
    call = Call(str(recipe), "2026-01-05", ())
    left = f"{task.stem(call, context_of('again'))}-0"
    entrypoint = f"sh -c 'until [ -e {task.gate} ]; do sleep 0.1; done; echo it went on'"
    httpx.post(
        f"{ray}/api/jobs/",
        json={"entrypoint": entrypoint, "submission_id": left},
        trust_env=False,
        timeout=600,
    ).raise_for_status()
    before = set(jobs(ray))
    with caplog.at_level(logging.INFO):
        task.carry_out(call, context_of("again"))
    assert set(jobs(ray)) == before and jobs(ray)[left]["status"] == "SUCCEEDED"


def test_a_job_that_fails_for_good_fails_the_task_with_its_line(
    world: World, tmp_path: Path
) -> None:
    recipe = world.write(tmp_path / "tiny.yaml", tmp_path / "root")
    task = RayJobOperator(task_id="bad", recipe=str(recipe), arguments=["run", "--step", "none"])
    with pytest.raises(AirflowFailException, match=r"^'none' is no step; .* \(exit code 2\)$"):
        task.carry_out(Call(str(recipe), "2026-01-05", ()), context_of("bad"))
