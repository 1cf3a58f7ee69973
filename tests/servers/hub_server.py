"""A hub on loopback: the part of the protocol that huggingface_hub reads and writes by."""

import base64
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
    large: dict[str, bytes] = field(default_factory=dict)  # uploaded, by sha256
    breaks_after: int = -1  # of that many uploads one ends in the middle
    refuses_writing: bool = False

    def push(self, name: str, folder: Path, *, branch: str = "main") -> str:
        """Make a commit of a folder's files, the tip of a branch from now on; return it."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self.commit(name, files, branch)

    def commit(self, name: str, files: dict[str, bytes], branch: str) -> str:
        """Make a commit of files by path, the tip of a branch from now on; return it."""
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
            if not parts or owner == "whoami-v2":  # what it asks beside repositories
                self._send(404, b"", {})
                return
            name, *rest = f"{owner}/{parts[0]}", *parts[1:3]
            kind, revision = rest or ("revision", "main")
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
            if file not in files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            body = files[file]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(body)}"'}
            if file in hub.broken and with_body:
                self._send(200, body[: len(body) // 2], headers, length=len(body))
                self.close_connection = True
                return
            self._send(200, body, headers, with_body=with_body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.partition("?")[0]
            hub.asked.append(f"POST {path}")
            parts = path.strip("/").split("/")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._send(401, b'{"error": "Invalid username or password."}', {})
            elif parts[-1] == "validate-yaml":
                self._send(200, b'{"errors": [], "warnings": []}', {})
            elif parts[-1] == "create":
                self._create(json.loads(body))
            elif hub.refuses_writing:
                self._send(403, b'{"error": "Forbidden: no write access."}', {})
            elif parts[-1] == "batch":
                self._send(200, json.dumps(self._lfs(json.loads(body))).encode(), {})
            else:
                name, kind = "/".join(parts[1:4]), parts[4]
                answer = self._modes if kind == "preupload" else self._commit
                self._send(200, json.dumps(answer(name, body)).encode(), {})

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.asked.append(f"PUT {self.path}")
            if len(hub.large) == hub.breaks_after:
                hub.breaks_after = -1
                self.close_connection = True  # in the middle of an upload
                return
            hub.large[self.path.rpartition("/")[2]] = body
            self._send(200, b"", {})

        def _create(self, asked: dict[str, Any]) -> None:
            name = f"datasets/{asked['organization']}/{asked['name']}"
            if name in hub.commits:
                self._send(409, json.dumps({"url": f"{hub.url}/{name}"}).encode(), {})
                return
            hub.commits[name] = {_FIRST: {}}
            hub.branches[name] = {"main": _FIRST}
            if asked["visibility"] == "private":
                hub.private.add(name)
            self._send(200, json.dumps({"url": f"{hub.url}/{name}"}).encode(), {})

        def _modes(self, name: str, body: bytes) -> Any:
            _, files = hub.find(name, "main") or ("", {})
            modes = []
            for file in json.loads(body)["files"]:
                path = file["path"]
                is_large = path.endswith((".arrow", ".feather", ".safetensors"))
                there = files.get(path)
                oid = None if there is None else _sha256(there) if is_large else _blob(there)
                mode = "lfs" if is_large else "regular"
                modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return {"files": modes}

        def _lfs(self, asked: Any) -> Any:
            objects = []
            for item in asked["objects"]:
                upload = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
                objects.append(item if item["oid"] in hub.large else item | {"actions": upload})
            return {"transfer": "basic", "objects": objects}

        def _commit(self, name: str, body: bytes) -> Any:
            _, files = hub.find(name, "main") or ("", {})
            files = dict(files)
            for line in body.splitlines():
                said = json.loads(line)
                value = said["value"]
                if said["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if said["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            commit = hub.commit(name, files, "main")
            url = f"{hub.url}/{name}/commit/{commit}"
            return {"commitUrl": url, "commitOid": commit, "success": True}

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


_FIRST = "0" * 40  # the commit of a repository without files


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _blob(body: bytes) -> str:
    """Return what git calls a file of these bytes."""
    return _oid(b"blob %d\0" % len(body) + body)


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
    patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # it has servers of its own
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "token"))
