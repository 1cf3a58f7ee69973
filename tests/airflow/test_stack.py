"""A whole Airflow on loopback: scheduled runs, killed tasks, time-outs, assets, backfills."""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import HOME, World, tables

START_WITHIN_S, WITHIN_S = 900.0, 1200.0  # where nothing comes; a fifth of it is enough
RETRY = {"retries": 6, "retry_delay_s": 2}


class Webhook:
    """A server that writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        lines = self.lines

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                lines.append(json.loads(body)["text"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


class Stack:
    """``airflow standalone`` and its REST interface."""

    def __init__(self, recipes: Path, webhook: Webhook) -> None:
        self.recipes, self.webhook = recipes, webhook
        ports = [free_port() for _ in range(3)]
        address = f"http://127.0.0.1:{ports[0]}"
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TEACHERCACHE_RECIPES": str(recipes),
            "TEACHERCACHE_WEBHOOK": webhook.address,
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(ports[0]),
            "AIRFLOW__API__BASE_URL": address,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
            "AIRFLOW__CORE__PARALLELISM": "3",
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(ports[1]),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(ports[2]),
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "60",
        }
        self.log = (HOME / "standalone.log").open("wb")
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("airflow")), "standalone"],
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.client = httpx.Client(base_url=address, trust_env=False, timeout=60)

    def wait_until_healthy(self) -> None:
        def healthy() -> bool:
            try:
                found = self.client.get("/api/v2/monitor/health").json()
            except (httpx.HTTPError, ValueError):
                return False
            parts = ("metadatabase", "scheduler", "triggerer", "dag_processor")
            return all(found.get(part, {}).get("status") == "healthy" for part in parts)

        wait_for(healthy, START_WITHIN_S, self.why)
        passwords = HOME / "simple_auth_manager_passwords.json.generated"
        login = {"username": "admin", "password": json.loads(passwords.read_text())["admin"]}
        token = self.client.post("/auth/token", json=login).raise_for_status().json()
        self.client.headers["Authorization"] = f"Bearer {token['access_token']}"

    def why(self) -> str:
        return (HOME / "standalone.log").read_text(errors="replace")[-3000:]

    def get(self, path: str, **params: Any) -> Any:
        return self.client.get(f"/api/v2/{path}", params=params).raise_for_status().json()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.client.post(f"/api/v2/{path}", json=body)
        assert answer.is_success, answer.text
        return answer.json()

    def backfill(self, dag: str, first: str, last: str) -> None:
        """Ask for a backfill. SQLite may be locked just then: what was half begun is cancelled."""
        asked = {
            "dag_id": dag,
            "from_date": f"{first}T00:00:00Z",
            "to_date": f"{last}T00:00:00Z",
            "max_active_runs": 2,
            "reprocess_behavior": "failed",
        }

        def accepted() -> bool:
            answer = self.client.post("/api/v2/backfills", json=asked)
            if answer.status_code not in (409, 503):
                assert answer.is_success, answer.text
                return True
            for begun in self.get("backfills", dag_id=dag)["backfills"]:
                if begun["completed_at"] is None:
                    self.client.put(f"/api/v2/backfills/{begun['id']}/cancel")
            return False

        wait_for(accepted, START_WITHIN_S, self.why)

    def unpause(self, dag: str) -> None:
        wait_for(lambda: dag in self.dags(), START_WITHIN_S, self.why)
        self.client.patch(f"/api/v2/dags/{dag}", json={"is_paused": False}).raise_for_status()

    def dags(self) -> list[str]:
        return [dag["dag_id"] for dag in self.get("dags", limit=100)["dags"]]

    def runs(self, dag: str) -> list[dict[str, Any]]:
        return list(self.get(f"dags/{dag}/dagRuns", limit=100)["dag_runs"])

    def tasks(self, dag: str, run: str) -> list[dict[str, Any]]:
        found = self.get(f"dags/{dag}/dagRuns/{run}/taskInstances", limit=100)
        return list(found["task_instances"])

    def wait_for_runs(self, dag: str, number: int = 1) -> list[dict[str, Any]]:
        """Wait until so many runs of a DAG have ended, and well."""

        def ended() -> bool:
            states = [run["state"] for run in self.runs(dag)]
            assert "failed" not in states, self.what_failed(dag)
            return states.count("success") >= number

        wait_for(ended, WITHIN_S, lambda: str(self.runs(dag)) + self.why())
        return self.runs(dag)

    def what_failed(self, dag: str) -> str:
        return "\n".join(
            f"{task['task_id']} {task['map_index']}: {task['state']}\n"
            + self.log_of(dag, run["dag_run_id"], task)[-2000:]
            for run in self.runs(dag)
            for task in self.tasks(dag, run["dag_run_id"])
            if task["state"] in ("failed", "up_for_retry")
        )

    def log_of(self, dag: str, run: str, task: dict[str, Any], number: int | None = None) -> str:
        path = f"dags/{dag}/dagRuns/{run}/taskInstances/{task['task_id']}/logs"
        tries = number or task["try_number"]
        found: dict[str, Any] = self.get(
            f"{path}/{tries}", map_index=task["map_index"], full_content=True
        )
        return "\n".join(str(line.get("event", line)) for line in found["content"])

    def stop(self) -> None:
        """End the whole group; what a task was doing ends with it."""
        for how, within_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(within_s)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.client.close()
        self.log.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(condition: Callable[[], Any], within_s: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def stack(world: World, roots: Path) -> Iterator[Stack]:
    """A running Airflow with four recipes of which one cannot be read; all DAGs are paused."""
    recipes = roots / "recipes"
    today = datetime.now(UTC)
    for day in (today, today - timedelta(days=1)):
        texts = world.folder / "text"
        shutil.copy(texts / "long.jsonl", texts / f"{day:%Y-%m-%d}.jsonl")

    def add(name: str, **schedule: Any) -> None:
        path = recipes / f"{name}.yaml"
        world.write(path, roots / name, name=name, schedule={**RETRY, **schedule})

    add("nightly", cron="@daily", start_date=datetime(2026, 1, 5).date())
    began = time.monotonic()
    world.plain_run(f"{today:%Y-%m-%d}")
    plain_s = time.monotonic() - began  # of which a try does a part, on this machine just now
    add("timed", timeout_minutes=max(0.5, 2 * plain_s / 60), deadline_minutes=0.05)
    add("twice", max_active_runs=2)
    (recipes / "broken.yaml").write_text("name: broken\nsteps:\n  a: [\n")
    running = Stack(recipes, Webhook())
    try:
        running.wait_until_healthy()
        yield running
    finally:
        running.stop()


def commands(root: Path, word: str) -> list[psutil.Process]:
    """The teachercache processes that work below a root and were given this word."""
    recipe = f"/{root.name}.yaml"
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if word in words and any(part.endswith(recipe) for part in words):
            found.append(process)
    return found


def finished_shards(root: Path) -> dict[Path, int]:
    found = (root / "teacher_logits").glob("*/shard-*.json")
    return {path: path.with_suffix(".arrow").stat().st_mtime_ns for path in found}


def wait_for_first_shards(root: Path) -> psutil.Process:
    """Wait until a mapped task has finished a shard; return its command, stopped."""
    deadline = time.monotonic() + WITHIN_S
    while not (found := finished_shards(root)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    number = int(next(iter(found)).name.split("-")[1])
    for command in commands(root, "--shards"):
        words = command.cmdline()
        first, end = words[words.index("--shards") + 1].split(":")
        if int(first) <= number < int(end):
            command.suspend()
            return command
    raise AssertionError("the command has ended already")


def test_a_recipe_that_cannot_be_read_is_shown_and_the_others_are_there(stack: Stack) -> None:
    names = [f"{name}__{what}" for name in ("nightly", "timed", "twice") for what in WHAT]
    wait_for(lambda: set(stack.dags()) == {*names, "teachercache_audit"}, WITHIN_S, stack.why)
    wait_for(lambda: stack.get("importErrors")["import_errors"], WITHIN_S, stack.why)
    (error,) = stack.get("importErrors")["import_errors"]
    assert error["filename"].endswith("teachercache_recipe_errors.py")
    assert f"{stack.recipes}/broken.yaml, line 4: " in error["stack_trace"]


WHAT = ("cache", "train")


def test_a_scheduled_run_whose_task_is_killed_gives_the_same_bytes_and_students(
    stack: Stack, world: World, roots: Path
) -> None:
    root = roots / "nightly"
    stack.unpause("nightly__train")
    stack.unpause("nightly__cache")
    command = wait_for_first_shards(root)
    before = finished_shards(root)
    assert before and not list((root / "teacher_logits").glob("*/manifest.json"))
    task = command.parent()
    assert task is not None
    task.kill()
    command.wait(timeout=120)  # its command dies with it
    (run,) = stack.wait_for_runs("nightly__cache")
    assert run["run_type"] == "scheduled"
    day = run["logical_date"][:10]
    assert tables(root) == world.plain_run(day)
    after = finished_shards(root)
    assert {path: after[path] for path in before} == before  # finished shards are kept
    instances = stack.tasks("nightly__cache", run["dag_run_id"])
    shards = [task for task in instances if task["task_id"] == "signals.shards"]
    assert sorted(task["try_number"] for task in shards) == [1, 2]
    assert {task["rendered_map_index"] for task in shards} >= {"shards 0:20"}
    retried = max(shards, key=lambda found: found["try_number"])
    log = stack.log_of("nightly__cache", run["dag_run_id"], retried)
    assert "shards are finished already" in log, log
    assert "Traceback" not in log, log
    # The asset, and what it started.
    events = stack.get("assets/events")["asset_events"]  # other tests leave some there, too
    ours = ("nightly__cache", run["dag_run_id"])
    (event,) = (e for e in events if (e["source_dag_id"], e["source_run_id"]) == ours)
    assert event["extra"]["date"] == day and event["extra"]["overrides"] == []
    for name, group in (("documents", "documents"), ("signals", "teacher_logits")):
        told = event["extra"]["tables"][name]
        manifest = json.loads(Path(told["manifest"]).read_text())
        assert Path(told["manifest"]).parent.parent == root / group
        assert told["fingerprint"] == manifest["fingerprint"]
        totals = manifest["totals"]
        assert (told["rows"], told["bytes"]) == (totals["num_rows"], totals["num_bytes"])
    (trained,) = stack.wait_for_runs("nightly__train")
    assert trained["run_type"] == "asset_triggered"
    assert len(list((root / "checkpoints").glob("*/checkpoint.json"))) == 2


def test_a_backfill_over_two_days_makes_two_partitions(
    stack: Stack, world: World, roots: Path
) -> None:
    root, days = roots / "nightly", ("2026-01-05", "2026-01-06")
    before = tables(root)
    stack.backfill("nightly__cache", *days)
    runs = stack.wait_for_runs("nightly__cache", 3)
    assert sorted(r["logical_date"][:10] for r in runs if r["run_type"] == "backfill") == [*days]
    after = tables(root)
    assert {folder: after[folder] for folder in before} == before
    made = {folder: after[folder] for folder in after.keys() - before.keys()}
    expected = {name: body for day in days for name, body in world.plain_run(day).items()}
    assert made == expected and len(made) == 4


def test_a_hung_task_is_timed_out_with_its_command_and_a_late_run_is_told(
    stack: Stack, world: World, roots: Path
) -> None:
    root = roots / "timed"
    stack.unpause("timed__cache")
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    stack.post("dags/timed__cache/dagRuns", {"logical_date": None, "conf": {"date": day}})
    hung = wait_for_first_shards(root)  # stopped: it will neither work nor answer a signal
    before = finished_shards(root)
    hung.wait(timeout=WITHIN_S)
    (run,) = stack.wait_for_runs("timed__cache")
    assert tables(root) == world.plain_run(day)
    after = finished_shards(root)
    assert {path: after[path] for path in before} == before
    instances = stack.tasks("timed__cache", run["dag_run_id"])
    assert max(t["try_number"] for t in instances if t["task_id"] == "signals.shards") > 1
    assert any(
        line.startswith("timed__cache: ") and line.endswith("is not finished after 0.05 minutes")
        for line in stack.webhook.lines
    ), stack.webhook.lines


def test_two_runs_of_one_recipe_at_once_give_the_bytes_of_one(
    stack: Stack, world: World, roots: Path
) -> None:
    root, day = roots / "twice", "2026-01-05"
    stack.unpause("twice__cache")
    for _ in range(2):
        stack.post("dags/twice__cache/dagRuns", {"logical_date": None, "conf": {"date": day}})
    stack.wait_for_runs("twice__cache", 2)
    expected = world.plain_run(day)
    assert tables(root) == expected
    assert not list(root.rglob("*.tmp-*"))


def test_a_wrong_parameter_is_refused_and_a_wrong_recipe_fails_at_its_first_try(
    stack: Stack,
) -> None:
    refused = stack.client.post(
        "/api/v2/dags/twice__cache/dagRuns", json={"logical_date": None, "conf": {"workers": 0}}
    )
    assert refused.status_code in (400, 422) and "less than the minimum of 1" in refused.text
    conf = {"date": "2026-01-05", "overrides": ["steps.signals.encoding.kind=none"]}
    run = stack.post("dags/twice__cache/dagRuns", {"logical_date": None, "conf": conf})
    dag, name = "twice__cache", run["dag_run_id"]
    wait_for(
        lambda: stack.get(f"dags/{dag}/dagRuns/{name}")["state"] == "failed", WITHIN_S, stack.why
    )
    plan = next(task for task in stack.tasks(dag, name) if task["task_id"] == "plan")
    assert (plan["state"], plan["try_number"]) == ("failed", 1)
    wait_for(
        lambda: any("twice__cache.plan of" in line for line in stack.webhook.lines),
        WITHIN_S,
        stack.why,
    )
    assert "steps.signals.encoding" in stack.webhook.lines[-1]
