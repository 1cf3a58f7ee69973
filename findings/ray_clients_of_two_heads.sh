#!/usr/bin/env bash
# Ray 2.60.0 (grpcio 1.85.1, Linux): with two heads on one machine, a client of the first can be answered by the second.
#
# A head starts a server of its own for every client that connects to `ray://`. Its port is the first from 23000 on that can be bound;
# the head closes that socket again, and the server takes the port some seconds later, when its Python has imported Ray. gRPC listens
# with SO_REUSEPORT, so two servers that were given 23000 by two heads can both have it. Of two clients that connect at the same time
# one then ends with "Starting Ray client server failed", or, without any error, `ray.cluster_resources()` shows it the other cluster.
#
# Seen in a first run: round 1, the first cluster's client refused; round 2, the first cluster's client answered by the second.
# Seen in a second run: rounds 1 and 2 as they should be; round 3, the first's refused ("Perhaps you called ray.init twice by
# accident?") and the second's answered by the first. Expected: each client on the cluster whose address it names.
# It is a race: the script passes when one of up to twelve rounds shows a client refused or misled, and fails when none does.
set -euo pipefail

folder=$(mktemp -d /tmp/ray2h.XXXX) # short: Ray keeps sockets in it
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "ray[client]==2.60.0" "grpcio==1.85.1"

cat >"$folder/heads.py" <<'PYTHON'
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version

FOLDER = sys.argv[1]
BIN = os.path.dirname(sys.executable)
ENV = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
ENV["PATH"] = BIN + os.pathsep + ENV["PATH"]
PORTS = {"first": 24110, "second": 24310}  # the head's; its clients' is the next
CLIENT = """
import sys, time, ray
ray.init(sys.argv[1])
print(*sorted(name for name in ray.cluster_resources() if name in ("first", "second")))
sys.stdout.flush()
time.sleep(8)
"""


def head(name: str, port: int) -> subprocess.Popen:
    arguments = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "ray-client-server-port": port + 1,
        "metrics-export-port": port + 2,
        "dashboard-agent-listen-port": port + 3,
        "resources": '{"%s": 1}' % name,
        "num-cpus": 1,
        "include-dashboard": False,
        "object-store-memory": 100_000_000,
        "temp-dir": f"{FOLDER}/{name}",
    }
    return subprocess.Popen(
        [f"{BIN}/ray", "start", "--head", "--block", *(f"--{k}={v}" for k, v in arguments.items())],
        env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )


def wait_for(port: int) -> None:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 2).close()
        except OSError:
            time.sleep(0.2)


def client(port: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, f"ray://127.0.0.1:{port + 1}"],
        env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


print("ray", version("ray"), "grpcio", version("grpcio"))
heads = [head(name, port) for name, port in PORTS.items()]
surprises = 0
try:
    for port in PORTS.values():
        wait_for(port + 1)
    time.sleep(5)  # for what a head starts last, the agent that prepares a client's environment
    for attempt in range(12):
        clients = {name: client(port) for name, port in PORTS.items()}
        for name, process in clients.items():
            out, err = process.communicate()
            found = out.strip() or err.strip().splitlines()[-1]
            print(f"round {attempt + 1}: a client of the {name} cluster found: {found}")
            surprises += found != name
        if surprises:
            break
finally:
    for process in heads:
        os.killpg(process.pid, signal.SIGKILL)
sys.exit(0 if surprises else "every client was where it asked to be: Ray has changed")
PYTHON
"$folder/venv/bin/python" "$folder/heads.py" "$folder"
