"""Who may write a step: one whole run, or runs of different shards; locks die with their holder.

On a disk they are locks of the file system. Where it has none (some NFS mounts), and in an object
store, they are leases (``lease_lock.py``).
"""

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from weakref import WeakSet

from pipeline.state.lease_file import LeaseFile
from pipeline.state.lease_lock import LeasePlace, is_leased, lease
from schemas.errors import StoreError
from schemas.storage.file_locks import NoLocks, try_lock
from schemas.storage.files import Folder
from schemas.storage.object_path import ObjectPath

LOCK_FILE = ".lock"
SHARDS_LOCK_FILE = ".lock-shards"  # byte i of it stands for shard i
LEASE_FILE = ".lease"
_NAME_WITHIN_S = 1.0  # a holder writes its name right after it has the lock
_opened: WeakSet[IO[str]] = WeakSet()


def _let_go() -> None:
    """Close the lock files in a forked child: a loader's worker outlives a killed run a while."""
    for stream in list(_opened):
        stream.close()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def step_lock(
    folder: Folder, *, warned: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Hold the one right to write a step; raises StoreError when another process has it.

    ``warned`` is told of a file system without locks, and of a lease that is waited for or lost.
    """
    if isinstance(folder, ObjectPath):
        with lease(folder / LOCK_FILE, warned=warned):
            yield
        return
    with _lock_file(folder) as stream:
        with _without_locks(folder, warned) as missing:
            if not _lock(stream, fcntl.LOCK_EX, folder):
                raise _taken(folder, _holder(stream))
        if missing:
            with lease(LeaseFile(folder / LEASE_FILE), warned=warned):
                yield
            return
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

    Raises StoreError when a whole run has the step, or another process one of these shards. Where
    it is a lease it is one of exactly these shards, and a whole run that begins later is not
    held up: both would write the same bytes.
    """
    if isinstance(folder, ObjectPath):
        name = f"{LOCK_FILE}-{shards.start}-{shards.stop}"
        with _shards_lease(folder / name, folder / LOCK_FILE, folder, warned):
            yield
        return
    with _lock_file(folder) as stream, _lock_file(folder, SHARDS_LOCK_FILE) as bytes_of_shards:
        with _without_locks(folder, warned) as missing:
            if not _lock(stream, fcntl.LOCK_SH, folder):
                raise _taken(folder, _holder(stream))
            if not _lock(bytes_of_shards, fcntl.LOCK_EX, folder, shards):
                those = f"another run of shards {shards.start}:{shards.stop} or some of them"
                raise _taken(folder, those)
        if missing:
            ours = LeaseFile(folder / f"{LEASE_FILE}-{shards.start}-{shards.stop}")
            with _shards_lease(ours, LeaseFile(folder / LEASE_FILE), folder, warned):
                yield
            return
        _write_name(stream, "runs of some of its shards, the last one ")
        yield


def is_held(folder: Folder) -> bool:
    """Whether a run holds the step, or some of its shards; nothing is written.

    A run that begins in the moment of looking may be refused. A lease in a file is watched until
    its holder renews it, or has not for as long as a lease lasts.
    """
    if isinstance(folder, ObjectPath):
        leases = [path for path in folder.find() if path.name.startswith(LOCK_FILE)]
        return any(is_leased(path) for path in leases)
    try:
        with (folder / LOCK_FILE).open("r+") as stream:
            if not _lock(stream, fcntl.LOCK_EX, folder):
                return True
    except (FileNotFoundError, NoLocks):
        pass
    except PermissionError as error:
        raise StoreError(
            f"cannot see whether a run writes {folder}: {error.strerror} ({LOCK_FILE}); open it"
        ) from error
    return any(is_leased(LeaseFile(path)) for path in folder.glob(f"{LEASE_FILE}*"))


@contextmanager
def _shards_lease(
    ours: LeasePlace, whole: LeasePlace, folder: Folder, warned: Callable[[str], None]
) -> Iterator[None]:
    with lease(ours, warned=warned):
        if is_leased(whole):
            raise _taken(folder, "a run of the whole step")
        yield


def _lock(stream: IO[str], mode: int, folder: Path, part: range | None = None) -> bool:
    try:
        return try_lock(stream, mode, part)
    except NoLocks:
        raise
    except OSError as error:
        raise StoreError(
            f"cannot lock {stream.name}: {error.strerror or error}; mend the file system of "
            f"{folder}, or give this run another execution.root"
        ) from error


@contextmanager
def _without_locks(folder: Path, warned: Callable[[str], None]) -> Iterator[list[NoLocks]]:
    """Give a list that holds the file system's answer, once the block has met one without locks."""
    met: list[NoLocks] = []
    try:
        yield met
    except NoLocks as error:
        met.append(error)
        warned(
            f"the file system of {folder} has no file locks ({error.strerror}): this run holds the "
            f"step by a file there that it goes on renewing"
        )


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
        stream = open(folder / name, "a+", opener=_not_a_link)  # noqa: SIM115
    except OSError as error:
        raise StoreError(
            f"cannot write in {folder}: {error.strerror}; make it writable, or give this run "
            f"another execution.root"
        ) from error
    _opened.add(stream)
    return stream


def _not_a_link(path: str, flags: int) -> int:
    """Open a file, but none elsewhere that a link leads to: a holder's name is written there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def remove_torn_files(folder: Folder, stems: Collection[str] | None = None) -> None:
    """Delete what killed runs left half-written, of some shards or all; hold the lock for it."""
    if isinstance(folder, ObjectPath):
        folder.abort_uploads(stems)
        return
    for path in folder.glob("*.tmp-*"):
        if stems is None or path.name.split(".")[0] in stems:
            path.unlink(missing_ok=True)
