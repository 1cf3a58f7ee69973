"""Where a task runs the command, if not on Airflow's worker: a Ray job, a pod."""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowFailException
from teachercache_command import Call, calls, raise_for
from teachercache_tasks import TeachercacheOperator

POLL_S = 2.0


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
        token, url = ray_token(), httpx.URL(address)
        # Apart from the URL, which is part of what httpx says of a request that failed.
        user = (url.username, url.password) if url.userinfo and not token else None
        url = url.copy_with(userinfo=b"")
        headers = {"Authorization": f"Bearer {token}"} if token else {}

        def let_in(answer: httpx.Response) -> None:
            if answer.status_code in (401, 403):
                raise AirflowFailException(_no_entry(str(url), token))

        hooks = {"response": [let_in]}
        return httpx.Client(
            base_url=url, headers=headers, auth=user, timeout=60.0, event_hooks=hooks
        )


def ray_token() -> str | None:
    """Return the token to show a Ray cluster, from where Ray itself looks, in its order."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if told := os.environ.get("RAY_AUTH_TOKEN"):
        return told.strip() or None
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if named and not token:
        raise AirflowFailException(
            f"the file that RAY_AUTH_TOKEN_PATH names, {named}, is empty or cannot be read"
        )
    return token or None


def _no_entry(address: str, token: str | None) -> str:
    """Return why a cluster that asks for a token does not answer."""
    asks = f"the Ray cluster at {address} asks for a token"
    if token is not None:
        return (
            f"{asks}, and the one here is another: it is looked for in RAY_AUTH_TOKEN, the file "
            f"that RAY_AUTH_TOKEN_PATH names, and ~/.ray/auth_token, in this order"
        )
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return f"{asks}, and RAY_AUTH_MODE is disabled here: unset it, or set it to token"
    return (
        f"{asks} and there is none here: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that "
        f"holds it, or copy ~/.ray/auth_token from the cluster's head"
    )


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
