"""The ``teachercache`` command as a task calls it: its words, its process, its plan, its end."""

import ctypes
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException

_log = logging.getLogger("airflow.task")
HOPELESS = {2, 3}  # wrong recipe, too many rejected rows: a retry ends the same way
END_WITHIN_S = 10.0
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
    date = params.get("date") or run.partition_key
    date = date or (run.logical_date or run.run_after).strftime("%Y-%m-%d")
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
            "manifest": f"{step['folder']}/manifest.json",  # a folder, or a URL
        }
        for name, step in tables_of(steps).items()
    }
    return {"date": call.date, "overrides": list(call.overrides), "tables": tables}
