"""Small and whole files, in a folder or in an object store: read, written at once, hashed."""

import errno
import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar

from ..errors import ConfigError, StoreError
from .object_path import REQUESTS_AT_ONCE, SCHEMES, ObjectPath

_QUEUED = 10_000
# What file systems say that have no hard links, where two writers may both come first.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)

Item = TypeVar("Item")
Answer = TypeVar("Answer")


Folder = Path | ObjectPath


def as_folder(place: Folder | str) -> Folder:
    """Return ``s3://`` and ``gs://`` places as an ObjectPath, ``file://`` and any other as a Path.

    Raises ConfigError for another scheme, a place without a bucket, or one with credentials in it:
    places are written into records and logs.
    """
    if isinstance(place, Path | ObjectPath):
        return place
    scheme, mark, rest = place.partition("://")
    if not mark:
        return Path(place)
    if scheme == "file":
        return Path(f"/{rest.removeprefix('localhost').lstrip('/')}")
    if scheme not in SCHEMES:
        raise ConfigError(
            f"'{place}' begins with {scheme}://, expected a path, s3://, gs://, file://"
        )
    parts = [part for part in rest.split("/") if part]
    if not parts:
        raise ConfigError(f"'{place}' names no bucket: expected {scheme}://bucket/prefix")
    if "@" in parts[0] or (":" in parts[0] and "@" in rest and not parts[0].startswith("arn:")):
        raise ConfigError(
            f"'{place}' has credentials before its bucket: give them where the provider looks "
            f"(environment, ~/.aws, instance role), and the place as {scheme}://bucket/prefix"
        )
    return ObjectPath(f"{scheme}://{'/'.join(parts)}")


def require_below(names: Iterable[str]) -> None:
    """Raise ValueError for a name, as a folder's record gives it, that leads out of the folder."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"it names '{name}', which is no file below its folder")


def read_if_there(path: Folder) -> bytes | None:
    """Return a small file, None where there is none: on a store, one GET."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_many(paths: Sequence[Folder]) -> list[bytes | None]:
    """Return small files, None for each that is not there; from a store, many at once."""
    if all(isinstance(path, Path) for path in paths):
        return [read_if_there(path) for path in paths]
    return at_once(read_if_there, paths)


def at_once(ask: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
    """Return each answer in order; some questions wait for the store at the same time."""
    answers: list[Answer] = []
    pool = ThreadPoolExecutor(REQUESTS_AT_ONCE)
    try:
        for start in range(0, len(items), _QUEUED):
            answers.extend(pool.map(ask, items[start : start + _QUEUED]))
    finally:
        pool.shutdown(cancel_futures=True)  # the first error ends the rest
    return answers


@contextmanager
def uploaded(path: ObjectPath) -> Iterator[Path]:
    """Give a local file to write; it becomes the object when the block ends well."""
    with tempfile.TemporaryDirectory(prefix="teachercache-") as folder:
        file = Path(folder) / "object"
        yield file
        path.upload(file)


def sha256_of(path: Folder) -> str:
    """Return the sha256 of a file's bytes; those of an object are fetched for it."""
    if isinstance(path, ObjectPath):
        return path.sha256()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Folder) -> Iterator[IO[bytes]]:
    """Open a file that appears at ``path`` whole, on success, or not at all."""
    if isinstance(path, ObjectPath):
        with uploaded(path) as file:
            try:
                with file.open("xb") as stream:
                    yield stream
            except OSError as error:
                raise _write_error(file, error) from error
        return
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        with suppress(OSError):  # no folder at all; and the error above is the one to tell
            temporary.unlink(missing_ok=True)


def write_text(path: Folder, text: str) -> None:
    """Write a small file atomically: in an object store, with a single PUT."""
    if isinstance(path, ObjectPath):
        path.write_bytes(text.encode())
        return
    with atomic_file(path) as stream:
        stream.write(text.encode())


def write_once(path: Folder, text: str) -> bytes:
    """Write a small file unless there is one, and return what is there.

    Of several writers at once the first one's stays, and all are given it.
    """
    if isinstance(path, ObjectPath):
        path.create(text.encode())
        return path.read_bytes()
    whole = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    write_text(whole, text)
    try:
        with suppress(FileExistsError):
            os.link(whole, path)
            _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise _write_error(path, error) from error
        if not path.exists():
            os.replace(whole, path)
    finally:
        with suppress(OSError):  # no run takes it for anything
            whole.unlink()
    return path.read_bytes()


def rename(path: Folder, target: Folder) -> None:
    """Give a whole file another name in its folder, over what has it; in a store it is copied."""
    if isinstance(path, ObjectPath):
        assert isinstance(target, ObjectPath)
        path.rename(target)
        return
    assert isinstance(target, Path)
    try:
        os.replace(path, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _write_error(target, error) from error


def _write_error(path: Path, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"no space left writing {path}: free some or move `execution.root`, then run again; "
            f"finished shards are kept and nothing half-written counts as done"
        )
    return StoreError(f"cannot write {path}: {error.strerror or error}")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
