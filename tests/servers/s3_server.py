"""A real S3 server on loopback (moto's), and a proxy before it that does harm as it is told."""

import itertools
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import boto3
import pytest

from schemas.storage import object_path as object_store
from schemas.storage.object_path import ObjectPath

KEY_ID, SECRET = "AKIDLOOPBACK", "a-secret-that-nobody-may-write-down"


@dataclass(frozen=True)
class Server:
    """Where the server listens, and its buckets."""

    url: str
    names: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.url)

    def new_root(self) -> str:
        """Return a root in a bucket of its own."""
        bucket = f"bucket-{next(self.names)}"
        self.client.create_bucket(Bucket=bucket)
        return f"s3://{bucket}/cache"

    def put_files(self, root: str, folder: Path, files: Iterable[Path]) -> None:
        """Store files below ``folder`` under ``root``, as a tool does that knows nothing of us."""
        bucket, prefix = root.removeprefix("s3://").split("/")
        for path in files:
            key = f"{prefix}/{path.relative_to(folder)}"
            self.client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    def uploads(self, root: str) -> list[Any]:
        """The uploads in parts that nobody has finished or ended."""
        bucket = root.split("/")[2]
        return list(self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", []))

    def objects(self, root: str) -> dict[str, bytes]:
        """Every object of a bucket."""
        bucket = root.split("/")[2]
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        read = self.client.get_object
        return {key: read(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def use_endpoint(patch: pytest.MonkeyPatch, url: str) -> None:
    """Give this process, and those it starts, an endpoint and credentials by the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_ENDPOINT_URL", url)
    patch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    object_store._file_system.cache_clear()


@contextmanager
def running_server() -> Iterator[Server]:
    """Start the server in a process of its own."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while "Running on" not in (line := process.stderr.readline()):
            assert line, "the server did not start"
        log = threading.Thread(target=process.stderr.read)  # a full pipe would stop the server
        log.start()
        yield Server(line.split()[-1])
    finally:
        process.kill()
        process.wait()
        log.join()


@contextmanager
def looking_at_who_asks(server: Server) -> Iterator[Any]:
    """Make the server check credentials; give an access key that may do nothing."""
    iam = boto3.client("iam", endpoint_url=server.url)
    iam.create_user(UserName="nobody")
    key = iam.create_access_key(UserName="nobody")["AccessKey"]
    _check_after(server, 0)
    try:
        yield key
    finally:
        _check_after(server, 1_000_000)


def _check_after(server: Server, num_requests: int) -> None:
    address, headers = f"{server.url}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    body = str(num_requests).encode()
    urllib.request.urlopen(urllib.request.Request(address, body, headers, method="POST"))


# What a proxy may do to a request: let it pass, refuse it, keep the reply back, or cut the line
# before the server sees the request, or when half of the reply has gone out.
PASS, ERROR, SLOW, CUT_REQUEST, CUT_REPLY = "pass", "error", "slow", "cut request", "cut reply"
_REFUSAL = b"<Error><Code>InternalError</Code><Message>An internal error</Message></Error>"


class FaultyProxy(socketserver.ThreadingTCPServer):
    """Forwards one request a connection; ``fault`` says what happens to it, by method and path."""

    allow_reuse_address = True
    daemon_threads = True
    slow_s: ClassVar[float] = 3.0

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        host, port = upstream.removeprefix("http://").split(":")
        self.upstream = (host, int(port))
        self.fault: Callable[[str, str], str] = lambda method, path: PASS
        self.seen: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, method: str, word: str = "") -> int:
        """How many requests came in of a method, with this in their path."""
        return sum(m == method and word in path for m, path in self.seen)


@contextmanager
def faulty_proxy(server: Server) -> Iterator[FaultyProxy]:
    """Run a proxy before the server."""
    with FaultyProxy(server.url) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


class _Forward(socketserver.StreamRequestHandler):
    server: FaultyProxy

    def handle(self) -> None:
        head, body = self._request()
        if not head:
            return
        method, path = head.split(b" ", 2)[:2]
        request = (method.decode(), path.decode())
        self.server.seen.append(request)
        fault = self.server.fault(*request)
        if fault == ERROR:
            self._answer(b"HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\n", _REFUSAL)
        elif fault != CUT_REQUEST:
            reply = self._ask(head, body)
            if fault == SLOW:
                time.sleep(self.server.slow_s)
            self.wfile.write(reply[: len(reply) // 2] if fault == CUT_REPLY else reply)

    def _request(self) -> tuple[bytes, bytes]:
        lines, size, chunked = [], 0, False
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            name, _, value = line.lower().partition(b":")
            if name == b"expect":
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                continue
            size = int(value) if name == b"content-length" else size
            chunked = chunked or (name == b"transfer-encoding" and b"chunked" in value)
            if name != b"connection":
                lines.append(line)
        if not lines:
            return b"", b""
        body = b"".join(self._chunks()) if chunked else self.rfile.read(size)
        return b"".join([*lines, b"Connection: close\r\n", b"\r\n"]), body

    def _chunks(self) -> Iterator[bytes]:
        while True:
            line = self.rfile.readline()
            size = int(line.split(b";")[0], 16)
            yield line
            if size == 0:
                while (line := self.rfile.readline()) not in (b"\r\n", b""):
                    yield line
                yield b"\r\n"
                return
            yield self.rfile.read(size + 2)

    def _ask(self, head: bytes, body: bytes) -> bytes:
        with socket.create_connection(self.server.upstream) as upstream:
            upstream.sendall(head + body)
            return b"".join(iter(lambda: upstream.recv(1 << 16), b""))

    def _answer(self, head: bytes, body: bytes) -> None:
        self.wfile.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)


def place(root: str, *names: str) -> ObjectPath:
    """Return what lies below a root."""
    return ObjectPath("/".join([root, *names]))
