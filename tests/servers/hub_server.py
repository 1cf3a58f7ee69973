"""A hub on loopback: the part of the protocol that huggingface_hub reads repositories by."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_loopbacktokenthatnobodymaywritedown"


@dataclass
class Hub:
    """Repositories by name: revisions of files, and branches; what was asked, and of whom.

    The name of a data set begins with ``datasets/``.
    """

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # files that end in the middle

    def push(self, name: str, folder: Path, *, branch: str = "main") -> str:
        """Make a commit of a folder's files, the tip of a branch from now on; return it."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        digest = hashlib.sha1(usedforsecurity=False)
        for file, body in files.items():
            digest.update(file.encode() + body)
        commit = digest.hexdigest()
        self.commits.setdefault(name, {})[commit] = files
        self.branches.setdefault(name, {})[branch] = commit
        return commit

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit that a revision is, and its files."""
        commit = self.branches.get(name, {}).get(revision, revision)
        files = self.commits.get(name, {}).get(commit)
        return None if files is None else (commit, files)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            is_api = parts[0] == "api"
            if is_api:
                parts = parts[2:] if parts[1] == "models" else parts[1:]
            owner = "/".join(parts[:2] if parts[0] == "datasets" else parts[:1])
            parts = parts[len(owner.split("/")) :]
            if len(parts) < 3:  # what it asks beside repositories
                self._send(404, b"", {})
                return
            name, kind, revision = f"{owner}/{parts[0]}", parts[1], parts[2]
            if name not in hub.commits or (
                name in hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
            ):
                self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
                return
            found = hub.find(name, revision)
            if found is None:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
            commit, files = found
            if is_api:
                self._send(200, json.dumps(self._about(kind, name, commit, files)).encode(), {})
                return
            file = "/".join(parts[3:])
            body = files[file]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(body)}"'}
            if file in hub.broken and with_body:
                self._send(200, body[: len(body) // 2], headers, length=len(body))
                self.close_connection = True
                return
            self._send(200, body, headers, with_body=with_body)

        def _about(self, kind: str, name: str, commit: str, files: dict[str, bytes]) -> Any:
            if kind == "revision":
                siblings = [{"rfilename": file} for file in files]
                about = {"id": name.removeprefix("datasets/"), "sha": commit, "siblings": siblings}
                return about if name.startswith("datasets/") else about | {"modelId": name}
            assert kind == "tree", kind
            return [
                {"type": "file", "path": file, "size": len(body), "oid": _oid(body)}
                for file, body in files.items()
            ]

        def _send(
            self,
            code: int,
            body: bytes,
            headers: dict[str, str],
            *,
            with_body: bool = True,
            length: int | None = None,
        ) -> None:
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    return Handler


def _oid(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a hub without repositories on a port of its own."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(patch: pytest.MonkeyPatch, url: str, cache: Path, *, offline: bool = False) -> None:
    """Give huggingface_hub of this process another hub and another cache."""
    patch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # its retries
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "token"))
