"""Who may write a step: one whole run, or runs of different shards; locks die with their holder."""

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipeline.state.lease_lock import is_leased, lease
from schemas.errors import StoreError
from schemas.storage.files import Folder
from schemas.storage.object_path import ObjectPath

LOCK_FILE = ".lock"
SHARDS_LOCK_FILE = ".lock-shards"  # byte i of it stands for shard i
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
            raise _taken(folder, _holder(stream)) from error
        _write_name(stream, "")
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(stream.fileno(), 0)


@contextmanager
def shards_lock(
    folder: Folder, shards: range, *, warned: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Hold the right to write some shards of a step; others may hold other shards meanwhile.

    Raises StoreError when a whole run has the step, or another process one of these shards. In an
    object store it is a lease of exactly these shards, and a whole run that begins later is not
    held up: both would write the same bytes.
    """
    if isinstance(folder, ObjectPath):
        with lease(folder / f"{LOCK_FILE}-{shards.start}-{shards.stop}", warned=warned):
            if is_leased(folder / LOCK_FILE):
                raise _taken(folder, "a run of the whole step")
            yield
        return
    with _lock_file(folder) as stream, _lock_file(folder, SHARDS_LOCK_FILE) as bytes_of_shards:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(folder, _holder(stream)) from error
        try:
            mode = fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.lockf(bytes_of_shards, mode, len(shards), shards.start)
        except OSError as error:
            those = f"another run of shards {shards.start}:{shards.stop} or some of them"
            raise _taken(folder, those) from error
        _write_name(stream, "runs of some of its shards, the last one ")
        yield


def _taken(folder: Folder, holder: str) -> StoreError:
    return StoreError(
        f"{folder} is being written by {holder}; wait for it to end and run again, or give this "
        f"run another execution.root"
    )


def _write_name(stream: IO[str], what: str) -> None:
    name = f"{what}process {os.getpid()} on {os.uname().nodename}"
    with suppress(OSError):  # the name is for people: a full disk is met, and told, later
        os.ftruncate(stream.fileno(), 0)
        os.write(stream.fileno(), name.encode())


def _holder(stream: IO[str]) -> str:
    deadline = time.monotonic() + _NAME_WITHIN_S
    while True:
        stream.seek(0)
        name = stream.read().strip()
        if name or time.monotonic() > deadline:
            return name or "another process"
        time.sleep(0.02)


def _lock_file(folder: Path, name: str = LOCK_FILE) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / name).open("a+")
    except OSError as error:
        raise StoreError(
            f"cannot write in {folder}: {error.strerror}; free or open it, or give this run "
            f"another execution.root"
        ) from error


def remove_torn_files(folder: Folder, stems: Collection[str] | None = None) -> None:
    """Delete what killed runs left half-written, of some shards or all; hold the lock for it."""
    if isinstance(folder, ObjectPath):
        folder.abort_uploads(stems)
        return
    for path in folder.glob("*.tmp-*"):
        if stems is None or path.name.split(".")[0] in stems:
            path.unlink(missing_ok=True)
