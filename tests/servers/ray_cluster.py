"""A real Ray cluster of one machine on loopback, as ``ray start`` makes it, and its end."""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

# Every cluster asks for this token, as one does where a Ray has been started before; with it no Ray
# writes one into the home folder. Nothing is sent anywhere.
ENVIRONMENT = {"RAY_AUTH_TOKEN": "0123456789abcdef" * 2, "RAY_USAGE_STATS_ENABLED": "0"}
ASKING = {"RAY_AUTH_MODE": "token"}
BIN = Path(sys.executable).parent
# The head's own server of a client has 30 s to start, and on a busy machine takes longer. One that
# dies as it starts (seen with Ray 2.60) is waited for all the same, and then asked for again.
SLOW_START = {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120"}


@dataclass(frozen=True)
class Cluster:
    """Where a cluster is reached: by drivers, by clients, by who submits jobs; and its head."""

    address: str
    client_address: str
    jobs_address: str
    head: subprocess.Popen[bytes]


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on and that no socket is given by the system itself.

    Those it gives away may be another process's by the time that a server has started.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(24_100, 32_000)
        with suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            ports.append(port)
    return ports


@contextmanager
def one_client_at_a_time() -> Iterator[None]:
    """Hold back the clients of other clusters of this machine.

    Each head of Ray 2.60 gives its clients the first port from 23000 on that it finds free, and
    takes it seconds later: of two heads at once one fails, or both share the port and a client
    is answered by the other cluster (findings/ray_clients_of_two_heads.sh).
    """
    with FileLock(Path(tempfile.gettempdir()) / "teachercache-ray-clients.lock"):
        yield


@contextmanager
def ray_cluster(
    *, num_cpus: int, num_gpus: int, env: Mapping[str, str], takes_jobs: bool = True
) -> Iterator[Cluster]:
    """Start a head, wait for it, and end it with all that it started. GPUs are a number only.

    What takes jobs is Ray's dashboard, ten processes that take as long to start as all the rest.
    """
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # its sockets' names have to be short
    port, client, dashboard, agent, metrics = free_ports(5)
    arguments = [
        "--head",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--ray-client-server-port={client}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}",
        f"--num-cpus={num_cpus}",
        f"--num-gpus={num_gpus}",
        f"--temp-dir={folder}",
        f"--include-dashboard={takes_jobs}",
    ]
    head = _ray_start(arguments, env)
    try:
        if takes_jobs:
            _wait_for(head, f"http://127.0.0.1:{dashboard}/api/version")
        _wait_for_port(head, port)
        _wait_for_port(head, client)
        yield Cluster(
            address=f"127.0.0.1:{port}",
            client_address=f"ray://127.0.0.1:{client}",
            jobs_address=f"http://127.0.0.1:{dashboard}",
            head=head,
        )
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def another_machine(cluster: Cluster, *, num_cpus: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a second Ray node on this machine that has joined the cluster, and end it."""
    arguments = [f"--address={cluster.address}", f"--num-cpus={num_cpus}", "--num-gpus=0"]
    node = _ray_start(arguments, {})
    try:
        yield node
    finally:
        _end(node)


def kill_machine(node: subprocess.Popen[bytes]) -> None:
    """SIGKILL a node and all that runs on it, as a machine ends that loses its power."""
    everyone = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    for process in everyone:
        with suppress(psutil.NoSuchProcess):  # it ended with one before it
            process.kill()
    psutil.wait_procs(everyone)  # killed: the kernel ends them


def _ray_start(arguments: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [str(BIN / "ray"), "start", "--block", "--object-store-memory=100000000", *arguments],
        env={**os.environ, **ENVIRONMENT, **SLOW_START, **ASKING, **env, **path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait_for(head: subprocess.Popen[bytes], url: str) -> None:
    while True:
        assert head.poll() is None, "Ray did not start"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:  # an answer, to who has no token
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)


def _wait_for_port(head: subprocess.Popen[bytes], port: int) -> None:
    while True:
        assert head.poll() is None, "Ray takes no clients"
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
            return
        except OSError:
            time.sleep(0.2)


def _end(node: subprocess.Popen[bytes]) -> None:
    """A cluster that no test needs any longer may go as a lost one does: Ray's own end is slow."""
    if node.poll() is None:
        kill_machine(node)
