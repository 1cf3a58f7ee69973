"""The last checkpoint of a training step in an object store: any machine can go on from it.

The trainer saves checkpoints into its working folder. Each is uploaded when it is whole, under
``checkpoints/checkpoint-<step>``; then one PUT of ``checkpoints/latest.json`` says that it is
there, and the one before is deleted.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import StoreError
from schemas.storage.file_locks import NoLocks, locked
from schemas.storage.files import read_if_there, sha256_of
from schemas.storage.object_path import ObjectPath
from stages.models.checkpoints.checkpoint import CHECKPOINTS, RUN, last_checkpoint

LATEST = "latest.json"


@dataclass(frozen=True, slots=True)
class SavedCheckpoints:
    """The checkpoints of a step's ``folder`` in a store, and those of its ``local`` folder."""

    folder: ObjectPath
    local: Path

    def fetch(self) -> None:
        """Bring the store's checkpoint here, unless this machine has one as late.

        Processes of one machine may call it at once: the first does the work.
        """
        latest = self._latest()
        if not latest:
            return
        here = self.local / CHECKPOINTS
        here.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.local / ".fetch"):
                self._bring(latest, here)
        except NoLocks as error:
            raise StoreError(
                f"cannot work in {self.local}: its file system has no file locks "
                f"({error.strerror}); set TEACHERCACHE_CACHE to a folder on a disk of this machine"
            ) from error

    def _bring(self, latest: dict[str, Any], here: Path) -> None:
        found = last_checkpoint(here)
        if found is not None and _step_of(found.name) >= _step_of(latest["name"]):
            return
        arriving = here / ".arriving"
        shutil.rmtree(arriving, ignore_errors=True)
        for name, sha256 in latest["files"].items():
            _download(self._place(latest["name"]) / name, arriving / name, sha256)
        _download(self.folder / CHECKPOINTS / RUN, here / RUN, latest["run"])
        shutil.rmtree(here / latest["name"], ignore_errors=True)
        arriving.rename(here / latest["name"])

    def save(self, checkpoint: Path) -> None:
        """Upload a whole checkpoint, then say so, then delete the one before."""
        before = self._latest()
        place = self._place(checkpoint.name)
        names = [str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()]
        files = {name: (place / name).upload(checkpoint / name) for name in sorted(names)}
        run = (self.folder / CHECKPOINTS / RUN).upload(self.local / CHECKPOINTS / RUN)
        body = {"name": checkpoint.name, "files": files, "run": run}
        (self.folder / CHECKPOINTS / LATEST).write_bytes(json.dumps(body, indent=1).encode())
        if before and before["name"] != checkpoint.name:
            self._delete(before)

    def remove(self) -> None:
        """Delete what is of no use to a finished step."""
        if latest := self._latest():
            (self.folder / CHECKPOINTS / LATEST).unlink()
            self._delete(latest)
            (self.folder / CHECKPOINTS / RUN).unlink()

    def _place(self, name: str) -> ObjectPath:
        return self.folder / CHECKPOINTS / name

    def _latest(self) -> dict[str, Any]:
        path = self.folder / CHECKPOINTS / LATEST
        try:
            body = json.loads(read_if_there(path) or b"{}")
        except ValueError as error:
            raise StoreError(f"{path} is damaged: delete it and run again") from error
        return body if isinstance(body, dict) else {}

    def _delete(self, latest: dict[str, Any]) -> None:
        for name in latest["files"]:
            (self._place(latest["name"]) / name).unlink()


def _step_of(name: str) -> int:
    return int(name.split("-")[1])


def _download(path: ObjectPath, file: Path, sha256: str) -> None:
    info = path.info()
    file.parent.mkdir(parents=True, exist_ok=True)
    if info is not None:
        path.download(file, info.num_bytes)
    if info is None or sha256_of(file) != sha256:
        raise StoreError(
            f"{path} is missing or damaged: delete {path.parent.parent / LATEST} and run again, "
            f"to train from the beginning"
        )
