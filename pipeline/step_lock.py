"""One run at a time writes a step: a lock on its folder, which dies with its holder."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipeline.lease_lock import lease
from schemas.errors import StoreError
from schemas.object_store import Folder, ObjectPath

LOCK_FILE = ".lock"
_NAME_WITHIN_S = 1.0  # a holder writes its name right after it has the lock


@contextmanager
def step_lock(
    folder: Folder, *, warned: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Hold the one right to write a step; raises StoreError when another process has it.

    In an object store it is a lease, and ``warned`` is told should it be lost.
    """
    if isinstance(folder, ObjectPath):
        with lease(folder / LOCK_FILE, warned=warned):
            yield
        return
    with _lock_file(folder) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{folder} is being written by {_holder(stream)}; wait for it to end and run "
                f"again, or give this run another execution.root"
            ) from error
        with suppress(OSError):  # the name is for people: a full disk is met, and told, later
            os.ftruncate(stream.fileno(), 0)
            os.write(stream.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(stream.fileno(), 0)


def _holder(stream: IO[str]) -> str:
    deadline = time.monotonic() + _NAME_WITHIN_S
    while True:
        stream.seek(0)
        name = stream.read().strip()
        if name or time.monotonic() > deadline:
            return name or "another process"
        time.sleep(0.02)


def _lock_file(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise StoreError(
            f"cannot write in {folder}: {error.strerror}; free or open it, or give this run "
            f"another execution.root"
        ) from error


def remove_torn_files(folder: Folder) -> None:
    """Delete what killed runs left half-written; call it with the step's lock held."""
    if isinstance(folder, ObjectPath):
        folder.abort_uploads()
        return
    for path in folder.glob("*.tmp-*"):
        path.unlink(missing_ok=True)
