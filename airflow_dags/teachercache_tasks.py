"""What a task does: it calls the ``teachercache`` command, and answers for all that this starts."""

import ctypes
import hashlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException

_log = logging.getLogger("airflow.task")
HOPELESS = {2, 3}  # wrong recipe, too many rejected rows: a retry ends the same way
END_WITHIN_S = 10.0
POLL_S = 2.0
_C = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def program() -> list[str]:
    """Return the command of the environment that teachercache is installed in."""
    return shlex.split(os.environ.get("TEACHERCACHE_COMMAND", "teachercache"))


@dataclass(frozen=True)
class Call:
    """One call of the command: what it is to do, for which date, with which changes."""

    recipe: str
    date: str
    overrides: tuple[str, ...]

    def arguments(self, verb: str, *options: str) -> list[str]:
        """Return the words that follow the program's name."""
        sets = [word for override in self.overrides for word in ("--set", override)]
        return [verb, self.recipe, *options, *sets]

    @property
    def environment(self) -> dict[str, str]:
        """What the command finds: ``DS``, and of Airflow's own settings none."""
        kept = {key: value for key, value in os.environ.items() if key[:9] != "AIRFLOW__"}
        return {**kept, "DS": self.date}


def calls(context: Context, recipe: str) -> list[Call]:
    """Return what a run is about: its own date, or that of each asset event that began it."""
    params = context["params"]
    workers = params.get("workers")
    sets = [f"execution.workers={workers}"] if workers else []
    events = (context.get("triggering_asset_events") or {}).values()
    extras = [event.extra for found in events for event in found if event.extra]
    if extras:
        asked = [(extra["date"], tuple(extra["overrides"])) for extra in extras]
        return [Call(recipe, date, (*more, *sets)) for date, more in dict.fromkeys(asked)]
    run = context["dag_run"]
    date = params.get("date") or (run.logical_date or run.run_after).strftime("%Y-%m-%d")
    return [Call(recipe, date, (*params.get("overrides", ()), *sets))]


class Process:
    """A command on this machine, in a process group of its own that ends with this task."""

    def __init__(self, arguments: Sequence[str], call: Call) -> None:
        command, parent = [*program(), *arguments], os.getpid()

        def end_with_parent() -> None:  # a task that is killed must not leave its work running
            if _C is not None:
                _C.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)

        try:
            self.popen = subprocess.Popen(
                command,
                cwd=Path(call.recipe).parent,
                env=call.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            raise AirflowFailException(
                f"cannot start {command[0]}: {error.strerror}; TEACHERCACHE_COMMAND names the "
                f"command of the environment that teachercache is installed in"
            ) from error

    def follow(self, say: Callable[[str], None]) -> str:
        """Pass each line on; return the last one. Raises as the command's exit code asks."""
        last = ""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            last = line.rstrip() or last
            say(line.rstrip())
        raise_for(self.popen.wait(), last)
        return last

    def end(self) -> None:
        """End the command and all it started, first by request."""
        for how, within_s in ((signal.SIGTERM, END_WITHIN_S), (signal.SIGKILL, None)):
            try:
                os.killpg(self.popen.pid, how)
                self.popen.wait(within_s)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def raise_for(code: int, last: str) -> None:
    """Raise where a command failed: for good, or for Airflow to try again."""
    if code == 0:
        return
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    problem = f"{last.removeprefix('error: ')} ({how})"
    raise AirflowFailException(problem) if code in HOPELESS else AirflowException(problem)


def read_plan(call: Call) -> dict[str, dict[str, Any]]:
    """Return ``teachercache plan --json`` by step."""
    lines: list[str] = []
    process = Process(call.arguments("plan", "--json"), call)
    try:
        process.follow(lines.append)
    except BaseException:
        process.end()
        for line in lines:
            _log.info(line)
        raise
    found = next(line for line in lines if line.startswith("[{"))
    return {step["name"]: step for step in json.loads(found)}


class TeachercacheOperator(BaseOperator):
    """Run ``teachercache`` with ``arguments`` on this worker, its lines in the task's log.

    ``shards`` (``0:16``) is what a mapped task makes of a step. Killed or timed out, the task takes
    the command and all it started with it; what shards were finished stay.
    """

    def __init__(
        self, *, recipe: str, arguments: Sequence[str], shards: str | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.recipe, self.arguments, self.shards = recipe, list(arguments), shards
        self._process: Process | None = None

    @property
    def words(self) -> list[str]:
        """The command's arguments."""
        return [*self.arguments, *(["--shards", self.shards] if self.shards else [])]

    def execute(self, context: Context) -> None:
        """Run the command, once for each date that the run is about."""
        for call in calls(context, self.recipe):
            self.carry_out(call, context)

    def carry_out(self, call: Call, context: Context) -> None:
        """Run the command to its end."""
        self.follow(call.arguments(*self.words), call)

    def follow(self, arguments: Sequence[str], call: Call) -> None:
        """Run ``teachercache`` with these words on this machine."""
        self.log.info("DS=%s teachercache %s", call.date, shlex.join(arguments))
        self._process = Process(arguments, call)
        self._process.follow(self.log.info)

    def on_kill(self) -> None:
        """End the command."""
        if self._process is not None:
            self._process.end()


class VerifyOperator(TeachercacheOperator):
    """Check every byte of the tables that a run is about."""

    def carry_out(self, call: Call, context: Context) -> None:
        """Find the tables, then look at them."""
        tables = tables_of(read_plan(call))
        self.follow(["verify", *(step["folder"] for step in tables.values())], call)


class RayJobOperator(TeachercacheOperator):
    """Run ``teachercache`` as a job of a Ray cluster, and follow it there.

    A task that is killed and tried again finds the job that it left running by the job's name, and
    goes on following it. The recipe's path and its root must be the same places on the cluster.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._job: str | None = None

    @staticmethod
    def stem(call: Call, context: Context) -> str:
        """Return what the names of a task's jobs begin with; every try of the task has the same."""
        task = context["ti"]
        key = [task.dag_id, task.run_id, task.task_id, task.map_index, call.date, call.overrides]
        return "teachercache-" + hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def carry_out(self, call: Call, context: Context) -> None:
        """Submit the job unless it is there already, then follow it."""
        stem = self.stem(call, context)
        on_ray = ("--set", "execution.executor=ray", "--set", "execution.address=auto")
        entrypoint = shlex.join(["teachercache", *call.arguments(*self.words), *on_ray])
        with self._client() as client:
            number = 0
            while (found := client.get(f"/api/jobs/{stem}-{number}")).status_code == 200:
                if found.json()["status"] in ("PENDING", "RUNNING"):
                    self.log.info("going on with Ray job %s-%d", stem, number)
                    break
                number += 1
            self._job = f"{stem}-{number}"
            if found.status_code != 200:
                body = {
                    "entrypoint": entrypoint,
                    "submission_id": self._job,
                    "runtime_env": {"env_vars": {"DS": call.date}},
                    "metadata": {"airflow": self.task_id},
                }
                self.log.info("Ray job %s: DS=%s %s", self._job, call.date, entrypoint)
                client.post("/api/jobs/", json=body).raise_for_status()
            self._follow(client, self._job)

    def _follow(self, client: httpx.Client, job: str) -> None:
        said = 0
        while True:
            info = client.get(f"/api/jobs/{job}").raise_for_status().json()
            text = client.get(f"/api/jobs/{job}/logs").raise_for_status().json()["logs"] or ""
            ended = info["status"] not in ("PENDING", "RUNNING")
            whole = len(text) if ended else text.rfind("\n") + 1
            for line in text[said:whole].splitlines():
                self.log.info(line)
            said = max(said, whole)
            if ended:
                break
            time.sleep(POLL_S)
        self._job = None
        if info["status"] == "SUCCEEDED":
            return
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        problem = errors[-1] if errors else str(info["message"] or info["status"]).split("\n")[0]
        raise_for(int(info.get("driver_exit_code") or 1), problem)

    def on_kill(self) -> None:
        """Stop the job."""
        if self._job is not None:
            with self._client() as client:
                client.post(f"/api/jobs/{self._job}/stop")

    @staticmethod
    def _client() -> httpx.Client:
        address = os.environ.get("TEACHERCACHE_RAY_ADDRESS", "http://127.0.0.1:8265")
        token = os.environ.get("RAY_AUTH_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=address, headers=headers, timeout=60.0)


def kubernetes_operator() -> type[BaseOperator]:
    """Return an operator that runs ``teachercache`` in a pod; it needs Airflow's provider for it.

    The pod's image, volumes and GPUs are those of the file ``TEACHERCACHE_POD_TEMPLATE``.
    """
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

    class TeachercachePodOperator(KubernetesPodOperator):
        env_vars: list[Any]

        def __init__(
            self,
            *,
            recipe: str,
            arguments: Sequence[str],
            shards: str | None = None,
            **options: Any,
        ) -> None:
            template = os.environ.get("TEACHERCACHE_POD_TEMPLATE")
            super().__init__(pod_template_file=template, cmds=["teachercache"], **options)
            self.recipe, self.words = recipe, [*arguments]
            self.shards = shards

        def execute(self, context: Context) -> None:
            words = [*self.words, *(["--shards", self.shards] if self.shards else [])]
            for call in calls(context, self.recipe):
                self.arguments = call.arguments(*words)
                self.env_vars = [*_no_date(self.env_vars), _pod_variable("DS", call.date)]
                super().execute(context)

    return TeachercachePodOperator


def _no_date(variables: Sequence[Any]) -> list[Any]:
    return [variable for variable in variables if variable.name != "DS"]


def _pod_variable(name: str, value: str) -> Any:
    from kubernetes.client import models

    return models.V1EnvVar(name=name, value=value)


def tables_of(steps: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the steps that make tables."""
    return {name: step for name, step in steps.items() if step["kind"] in ("source", "table")}


def extra_of(call: Call, steps: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the asset's event says of a run's tables."""
    tables = {
        name: {
            "fingerprint": step["fingerprint"],
            "rows": step["num_rows"],
            "bytes": step["num_bytes"],
            "manifest": str(Path(step["folder"]) / "manifest.json"),
        }
        for name, step in tables_of(steps).items()
    }
    return {"date": call.date, "overrides": list(call.overrides), "tables": tables}
