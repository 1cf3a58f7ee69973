"""A whole Airflow on loopback, as ``airflow standalone`` starts it, and its REST interface."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from conftest import HOME

START_WITHIN_S, WITHIN_S = 900.0, 1200.0  # where nothing comes; a fifth of it is enough


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
        self.pause(dag, False)

    def pause(self, dag: str, is_paused: bool = True) -> None:
        self.client.patch(f"/api/v2/dags/{dag}", json={"is_paused": is_paused}).raise_for_status()

    def run_again(self, dag: str, run: str, task: str) -> list[dict[str, Any]]:
        """Clear a task of a run and all behind it; return the run's tasks when all is well."""
        asked = {"dag_run_id": run, "task_ids": [task], "include_downstream": True}
        self.post(
            f"dags/{dag}/clearTaskInstances", {**asked, "only_failed": False, "dry_run": False}
        )
        self.wait_for_runs(dag, len(self.runs(dag)))
        return self.tasks(dag, run)

    def events_of(self, dag: str, run: str) -> list[dict[str, Any]]:
        found = self.get("assets/events", source_dag_id=dag, source_run_id=run)["asset_events"]
        return sorted(found, key=lambda event: event["timestamp"])

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
