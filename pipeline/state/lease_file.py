"""A lease in a file, for file systems without locks: read whole, written in place."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import StoreError
from schemas.storage.object_path import ObjectInfo

SETTLE_S = 0.5  # of two runs that take a lease over at once, the last to write it has it


@dataclass(slots=True)
class LeaseFile:
    """A file with the methods of ``lease_lock.LeasePlace``; each raises StoreError in one line.

    Its version is a hash of its bytes, which a renewal changes. It is as old as we have seen that
    version, by this process's monotonic clock: no clock of another machine has to be right. Each
    look opens the file anew, which is when NFS asks its server.
    """

    path: Path
    _seen: str = ""
    _since: float = 0.0

    @property
    def parent(self) -> Path:
        """The step's folder."""
        return self.path.parent

    def info(self) -> ObjectInfo | None:
        """Return the version and how long it has been that; None where there is no lease."""
        try:
            body = self.read_bytes()
        except FileNotFoundError:
            return None
        etag = hashlib.sha256(body).hexdigest()
        if etag != self._seen:
            self._seen, self._since = etag, time.monotonic()
        return ObjectInfo(len(body), etag, etag, time.monotonic() - self._since)

    def read_bytes(self) -> bytes:
        """Return what is written there; raises FileNotFoundError where there is none."""
        with self._told("read"):
            return self.path.read_bytes()

    def create(self, data: bytes) -> str | None:
        """Write the file, unless it is there; return its version."""
        with self._told("write"):
            try:
                with self.path.open("xb") as stream:
                    _write(stream.fileno(), data)
            except FileExistsError:
                return None
        return hashlib.sha256(data).hexdigest()

    def replace(self, data: bytes, etag: str) -> str | None:
        """Write over version ``etag`` and look whether it stays; return the new version."""
        found = self.info()
        if found is None or found.etag != etag:
            return None
        with self._told("write"):
            try:
                with self.path.open("r+b") as stream:
                    _write(stream.fileno(), data)
            except FileNotFoundError:
                return None
        time.sleep(SETTLE_S)
        found = self.info()
        written = hashlib.sha256(data).hexdigest()
        return written if found is not None and found.etag == written else None

    def unlink(self) -> None:
        """Delete the file, if it is there."""
        with self._told("delete"):
            self.path.unlink(missing_ok=True)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(
                f"cannot {what} {self.path}: {error.strerror or error}; make it writable, or give "
                f"this run another execution.root"
            ) from error


def _write(handle: int, data: bytes) -> None:
    """Write the bytes in place of what is there, and wait until the file system has them."""
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))
    os.fsync(handle)
