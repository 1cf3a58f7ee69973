"""A Python that has imported torch and transformers once: each process started from it is a fork.

Such a process is one like any other: in a group of its own, with its own environment, killed and
waited for by its id. What it lacks is the start of several seconds, which most tests only wait for.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from importlib import import_module
from typing import Any

# Read when they are imported by what is imported below: another value needs another server.
READ_AT_IMPORT = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTHONPATH")
# What a run of tables and students loads; no engine of vLLM, and no Ray, which reads more.
MODULES = (
    "pipeline.cli",
    "pipeline.steps.run",
    "stages.signals.teacher_logits.work",
    "stages.sources.documents.work",
    "stages.student.train.work",
    "transformers.models.llama.modeling_llama",
)


class WarmProcess(subprocess.Popen[str]):
    """A fork of the server that runs ``code``; waited for as any ``Popen`` is."""

    def __init__(self, code: str, arguments: list[str], env: dict[str, str]) -> None:
        self.args, self.returncode = arguments, None
        self.stdin = None
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (out, its_out), (err, its_err) = os.pipe(), os.pipe()
        asked = {"code": code, "argv": arguments, "env": env, "cwd": os.getcwd()}
        _server(env).ask(asked, (its_out, its_err, theirs.fileno()))
        for number in (its_out, its_err):
            os.close(number)
        theirs.close()
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.pid = int(self._heard())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self.returncode = int(self._heard())
            self._line.close()  # until then it was there as a zombie, and its id was its own
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._line], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, input: str | None = None, timeout: float | None = None) -> Any:
        assert input is None and timeout is None and self.stdout and self.stderr
        streams: dict[Any, list[bytes]] = {self.stdout: [], self.stderr: []}
        left = set(streams)
        while left:
            for stream in select.select(list(left), [], [])[0]:
                part = os.read(stream.fileno(), 1 << 16)
                streams[stream].append(part)
                left -= set() if part else {stream}
        self.wait()
        said = [b"".join(parts).decode() for parts in streams.values()]
        for stream in streams:
            stream.close()
        return said[0], said[1]

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def _heard(self) -> str:
        word = self._line.recv(64)
        assert word, "the warm Python has ended"
        return word.decode()


class _Server:
    """The Python that forks; it ends when this process does."""

    def __init__(self, env: dict[str, str]) -> None:
        self.line, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(theirs.fileno())],
            env=env,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # no terminal, as the pipes are none
            start_new_session=True,
        )
        theirs.close()

    def ask(self, asked: dict[str, Any], numbers: tuple[int, int, int]) -> None:
        body = json.dumps(asked).encode()
        socket.send_fds(self.line, [len(body).to_bytes(4, "big")], numbers)
        self.line.sendall(body)


_servers: dict[tuple[str | None, ...], _Server] = {}


def _server(env: dict[str, str]) -> _Server:
    key = tuple(env.get(name) for name in READ_AT_IMPORT)
    if key not in _servers:
        _servers[key] = _Server(env)
    return _servers[key]


def serve(line: socket.socket) -> str:
    """Fork for each that asks; return, in the fork, the code to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who wait for a process leave no zombie
    while True:
        size, numbers, _, _ = socket.recv_fds(line, 4, 3)
        if not size:
            os._exit(0)
        with line.makefile("rb", buffering=0) as stream:
            body = b""
            while len(body) < int.from_bytes(size, "big"):
                body += stream.read(int.from_bytes(size, "big") - len(body))
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            line.close()
            out, err, told = numbers
            if process := os.fork():
                os.close(out)
                os.close(err)
                _wait_for(process, socket.socket(fileno=told))
            os.close(told)
            return _become(json.loads(body), out, err)
        for number in numbers:
            os.close(number)


def _wait_for(process: int, told: socket.socket) -> None:
    """Tell its id and how it ended; its id is free again when that was heard."""
    told.send(str(process).encode())
    ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    by_itself = ended.si_code == os.CLD_EXITED
    told.send(str(ended.si_status if by_itself else -ended.si_status).encode())
    told.recv(1)
    os._exit(0)


def _become(asked: dict[str, Any], out: int, err: int) -> str:
    """Be what was asked for, as a new process would be."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever was inherited
    for number, stream in ((out, 1), (err, 2)):
        os.dup2(number, stream)
        os.close(number)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = asked["argv"]
    code: str = asked["code"]
    return code


if __name__ == "__main__":
    for name in MODULES:
        import_module(name)
    exec(serve(socket.socket(fileno=int(sys.argv[1]))))
