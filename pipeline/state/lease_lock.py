"""The lock of a step where files have none: an object or a file that its holder goes on renewing.

It is made by a write that fails where there is one already, and renewed by writes that fail where
another has taken it. A lock that nobody has renewed for ``LEASE_S`` seconds was left by a run that
died, and is taken over. Where a lease is lost all the same (a machine that slept), two runs write
the same bytes to the same names: wasted work, and nothing worse.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from schemas.errors import StoreError, TeacherCacheError
from schemas.storage.object_path import ObjectInfo, ObjectPath

LEASE_S = 30.0
RENEW_S = 10.0


class LeasePlace(Protocol):
    """Where a lease lies: an object of a store, or a file (``lease_file.py``)."""

    @property
    def parent(self) -> object:
        """The step's folder, for people."""

    def info(self) -> ObjectInfo | None:
        """Return the lease's version and age in seconds; None where there is none."""

    def read_bytes(self) -> bytes:
        """Return what is written there; raises FileNotFoundError where there is none."""

    def create(self, data: bytes) -> str | None:
        """Write it, unless it is there; return its version."""

    def replace(self, data: bytes, etag: str) -> str | None:
        """Write over version ``etag`` alone; return the new one."""

    def unlink(self) -> None:
        """Delete it."""


@contextmanager
def lease(path: LeasePlace, *, warned: Callable[[str], None]) -> Iterator[None]:
    """Hold the one right to write beside ``path``; raises StoreError when another run has it.

    A lock that is there is watched until its holder renews it, or does not in time. ``warned`` is
    told of that wait, and of a lease that was lost while the work goes on.
    """
    holder = f"process {os.getpid()} on {os.uname().nodename}, {uuid.uuid4().hex[:8]}"
    keeper = _Keeper(path, holder.encode(), _acquire(path, holder.encode(), warned), warned)
    keeper.thread.start()
    try:
        yield
    finally:
        keeper.end()


def is_leased(path: LeasePlace) -> bool:
    """Whether a run has this lock and goes on renewing it.

    The age of an object is known at once; a file is looked at until its version changes.
    """
    first = info = path.info()
    while info is not None and info.age_s <= LEASE_S:
        if isinstance(path, ObjectPath) or first is None or info.etag != first.etag:
            return True
        time.sleep(RENEW_S / 10)
        info = path.info()
    return False


def _acquire(path: LeasePlace, holder: bytes, warned: Callable[[str], None]) -> str:
    """Return the version of the lock that is now ours."""
    seen = ""
    while True:
        etag = path.create(holder) or _version_if_ours(path, holder)
        if etag is not None:
            return etag
        info = path.info()
        if info is None:
            continue
        if info.age_s > LEASE_S:
            etag = path.replace(holder, info.etag)
            if etag is not None:
                return etag
        elif seen and info.etag != seen:
            raise StoreError(
                f"{path.parent} is being written by {_name_in(path)}; wait for it to end and run "
                f"again, or give this run another execution.root"
            )
        if not seen:
            warned(
                f"{path.parent} is held by {_name_in(path)}: looking whether it is alive, for up "
                f"to {LEASE_S:g} s"
            )
        seen = seen or info.etag
        time.sleep(RENEW_S / 10)


def _version_if_ours(path: LeasePlace, holder: bytes) -> str | None:
    """Return the lock's version if it is ours after all: a PUT whose reply was lost is sent anew.

    The second then finds what the first wrote.
    """
    info, found = path.info(), _read(path)
    return info.etag if info is not None and found.startswith(holder) else None


def _name_in(path: LeasePlace) -> str:
    return _read(path).decode(errors="replace").split(", ")[0] or "another process"


def _read(path: LeasePlace) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


class _Keeper:
    """Renews a lease in a thread until told to end, then gives it back."""

    def __init__(
        self, path: LeasePlace, holder: bytes, etag: str, warned: Callable[[str], None]
    ) -> None:
        self.path, self.holder, self.etag, self.warned = path, holder, etag, warned
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.num_renewals = 0

    def _renew(self) -> None:
        while not self.ended.wait(RENEW_S):
            self.num_renewals += 1
            try:  # other bytes each time: a version that stays the same is a dead holder's
                body = self.holder + f", renewed {self.num_renewals}".encode()
                etag = self.path.replace(body, self.etag)
                etag = etag or _version_if_ours(self.path, self.holder)
            except TeacherCacheError:
                continue  # the work's own requests say what is wrong
            if etag is None:
                self.warned(
                    f"another run has taken {self.path.parent}, which this one did not renew in "
                    f"time; both write the same bytes, so end either"
                )
                return
            self.etag = etag

    def end(self) -> None:
        self.ended.set()
        self.thread.join()
        with suppress(TeacherCacheError):
            info = self.path.info()
            if info is not None and info.etag == self.etag:
                self.path.unlink()
