"""Locks on files (flock, lockf), and file systems that have none, such as some NFS mounts."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what such a one answers


class NoLocks(OSError):
    """The file system has no locks: whether another process is there, it cannot say."""


def try_lock(stream: IO[str] | IO[bytes], mode: int, part: range | None = None) -> bool:
    """Lock a file (``fcntl.LOCK_EX`` or ``LOCK_SH``) or bytes of it; False where another has it.

    Raises NoLocks on a file system without locks, and OSError for whatever else is wrong.
    """
    mode |= fcntl.LOCK_NB
    try:
        _call(stream, mode, part)
    except BlockingIOError:
        return False
    except PermissionError:  # what lockf may say of bytes that another process has
        if part is None:
            raise
        return False
    return True


def wait_for_lock(stream: IO[str] | IO[bytes], mode: int) -> None:
    """Lock a file, however long another has it; raises as ``try_lock`` does."""
    _call(stream, mode, None)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is there for nothing else; raises as ``try_lock`` does."""
    with path.open("a+b") as stream:
        wait_for_lock(stream, fcntl.LOCK_EX)
        yield


def _call(stream: IO[str] | IO[bytes], mode: int, part: range | None) -> None:
    try:
        if part is None:
            fcntl.flock(stream, mode)
        else:
            fcntl.lockf(stream, mode, len(part), part.start)
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise NoLocks(error.errno, error.strerror or "no locks") from error
        raise
