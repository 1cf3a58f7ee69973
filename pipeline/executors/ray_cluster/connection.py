"""Reach a Ray cluster, or start a Ray of our own; say in one line why there is none.

Imported before anything else of Ray: without the package this is where it is said.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, EngineError

try:
    import grpc
    import ray
    from ray._private.services import canonicalize_bootstrap_address
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient

    from pipeline.executors.ray_cluster.authentication import refuses_us, show_token
except ImportError as missing:
    raise ConfigError(
        f"Ray cannot be imported ({missing}): install teachercache[ray], or use execution.executor "
        f"local"
    ) from missing

CONNECT_TIMEOUT_S = 5.0
HEAD_START_S = 60.0  # for the last parts of a head that listens already


@contextmanager
def connected(address: str | None, folder: Path, *, num_cpus: int) -> Iterator[None]:
    """Be a driver of a cluster, or of a Ray of our own with ``num_cpus`` that ends with the run.

    Ray puts the folder it is called from on the workers' path, where a user's own ``schemas`` or
    ``stages`` would be found before ours: so it is called from the step's ``folder``. Raises
    EngineError where no cluster answers, ConfigError where the one that does knows us not.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # An error that two workers have is raised once: Ray would print the other's traceback.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    _require_answer(address)
    arguments: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        arguments |= {"num_cpus": num_cpus, "include_dashboard": False}
    before = Path.cwd()
    os.chdir(folder)
    try:
        _init(address or "local", arguments)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise EngineError(_no_ray(address, first_line(error))) from error
    finally:
        os.chdir(before)
    try:
        yield
    finally:
        ray.shutdown()


def _init(address: str, arguments: dict[str, Any]) -> None:
    """Connect. A head that listens already may not be able to serve a client yet: then ask again.

    The server of each client is made by an agent of the head, which is the last thing it starts. On
    a busy machine one attempt may take as long as the head has, so that is counted from the first
    one that failed.
    """
    deadline: float | None = None
    while True:
        try:
            ray.init(address=address, **arguments)
        except ConnectionAbortedError as error:  # by the head, with the traceback it has there
            ray.shutdown()
            if deadline is None:
                deadline = time.monotonic() + HEAD_START_S
            elif time.monotonic() > deadline:
                last_line = str(error).strip().splitlines()[-1]
                raise ConnectionError(f"its server for a client failed: {last_line}") from error
            time.sleep(1.0)
        else:
            return


def _require_answer(address: str | None) -> None:
    """Raise where nobody listens, or who listens refuses us: Ray would ask on, and fill the log."""
    try:  # "auto" is a Ray of this machine, or RAY_ADDRESS
        found = canonicalize_bootstrap_address(address) if address == "auto" else address
    except (ConnectionError, ValueError) as error:
        raise EngineError(_no_ray(address, first_line(error))) from error
    if found is not None and _has_port(found):
        if why := refusal(found):
            raise EngineError(_no_ray(address, why))
        cluster = f"the Ray cluster at execution.address {address}"
        show_token(cluster, lambda: refuses_us(found, CONNECT_TIMEOUT_S))


def _has_port(address: str) -> bool:
    return address.rpartition(":")[2].isdigit()


def refusal(address: str) -> str:
    """Return why no Ray answers at an address with a port, nothing when one does."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        return str(error)
    if address.startswith("ray://") or os.environ.get("RAY_USE_TLS") == "1":
        return ""
    with grpc.insecure_channel(address) as channel:
        try:  # the question that Ray's own machines ask the head
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            unheard = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            if error.code() in unheard:  # any other answer is an answer
                return "what listens there is no Ray head, or a stopped one"
    return ""


def head_of(address: str | None) -> str:
    """Where the cluster we are connected to is reached."""
    if address is not None and _has_port(address):
        return address
    return str(ray.get_runtime_context().gcs_address)


def _no_ray(address: str | None, why: str) -> str:
    if address is None:
        return f"Ray did not start on this machine: {why}"
    return (
        f"no Ray cluster at execution.address {address} ({why}): start one with "
        f"`ray start --head`, correct the address, or leave it out for a Ray of this run's own"
    )


def job_client(address: str) -> JobSubmissionClient:
    """Reach the Jobs API of a cluster; raises EngineError where there is none, as ``connected``."""

    def is_refused() -> bool:
        try:
            JobSubmissionClient(address)
        except AuthenticationError:
            return True
        return False

    try:
        show_token(f"the Ray cluster at {address}", is_refused)
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"no Ray cluster takes jobs at {address} ({first_line(error)}): start one with `ray "
            f"start --head`, or give the address of its dashboard with --address"
        ) from error


def first_line(error: Exception) -> str:
    """Return what an error says, without the lines below."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
