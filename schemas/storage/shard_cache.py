"""Copies on this machine of what lies in an object store, by checksum, within a limit of bytes.

A file is fetched once, checked against the checksum that its table's manifest gives, and kept
under that checksum in ``$TEACHERCACHE_CACHE/shards``. ``$TEACHERCACHE_CACHE_GB`` (20) is the limit:
room for a new file is made by deleting those used least recently. Any number of processes share
the folder: a file in use is locked (shared) by its reader and is not deleted, a file on its way is
there at its whole size, so that the files never come to more than the limit.

A file for which there is no room is not kept: the caller reads it from the store.
"""

import fcntl
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import ConfigError, StoreError
from .file_locks import NoLocks, locked, try_lock, wait_for_lock
from .files import Folder
from .object_path import ObjectPath

LIMIT, DEFAULT_GB = "TEACHERCACHE_CACHE_GB", 20.0
_PART = ".part"
_kept: "dict[Path, HeldFile]" = {}  # files that have a name in a folder of links, while we run


def user_cache() -> Path:
    """Return $TEACHERCACHE_CACHE, or ~/.cache/teachercache where that is not set."""
    return Path(os.environ.get("TEACHERCACHE_CACHE") or "~/.cache/teachercache").expanduser()


def cache_limit() -> int:
    """Return the limit in bytes; raises ConfigError where the variable holds no number."""
    text = os.environ.get(LIMIT) or str(DEFAULT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise ConfigError(f"{LIMIT} is '{text}', expected a number of gigabytes such as 20")
    return int(limit * 1e9)


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A copy that stays as long as it is open."""

    path: Path
    stream: IO[bytes]

    def close(self) -> None:
        """Let it be deleted when room is needed."""
        self.stream.close()


@contextmanager
def local_file(path: Folder, sha256: str, *, spare_from_s: float | None = None) -> Iterator[Path]:
    """Give a file on this machine with the bytes of ``path``, for as long as the block lasts.

    On a store that is the cached copy, or one of its own where there is no room (see ``hold``).
    Raises StoreError for an object that is missing or has another checksum.
    """
    if isinstance(path, Path):
        yield path
        return
    held = hold(path, sha256, spare_from_s=spare_from_s)
    if held is not None:
        try:
            yield held.path
        finally:
            held.close()
        return
    with tempfile.TemporaryDirectory(prefix="teachercache-") as scratch:
        file = Path(scratch) / path.name
        _fetch(path, file, _size_of(path), sha256)
        yield file


def local_files(folder: Folder, files: Mapping[str, str]) -> Path:
    """Return a folder on this machine with these files of ``folder``, given with their checksums.

    On a store it is made of links to copies that are held until this process ends.
    """
    if isinstance(folder, Path):
        return folder
    names = "".join(f"{name}\n{sha256}\n" for name, sha256 in sorted(files.items()))
    made = user_cache() / "folders" / hashlib.sha256(names.encode()).hexdigest()[:32]
    for name, sha256 in files.items():
        copy = user_cache() / "shards" / sha256
        if copy not in _kept:
            held = hold(folder / name, sha256)
            if held is None:
                raise StoreError(
                    f"no room for {folder / name} in {user_cache() / 'shards'}: raise {LIMIT} "
                    f"(now {cache_limit() / 1e9:g}), or end the runs that use what is there"
                )
            _kept[copy] = held
        link = made / name
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{uuid.uuid4().hex[:12]}")
        temporary.symlink_to(copy.absolute())
        os.replace(temporary, link)
    return made


def hold(path: ObjectPath, sha256: str, *, spare_from_s: float | None = None) -> HeldFile | None:
    """Return the copy of an object, fetched now if it is not there; None where there is no room.

    Files used at ``spare_from_s`` (seconds since 1970) or later are not deleted to make room: a
    reader that draws rows at random from more than fits would else fetch all of it again and again.
    """
    folder = user_cache() / "shards"
    target = folder / sha256
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            held = _held(target)
            if held is not None:
                return held
            with locked(folder / f"{sha256[:2]}.lock"):
                if target.exists():
                    continue
                part = target.with_suffix(_PART)
                num_bytes = _size_of(path)
                if not _reserve(part, num_bytes, spare_from_s):
                    return None
                try:
                    _fetch(path, part, num_bytes, sha256)
                    with locked(folder / "room.lock"):  # who counts sees it under one name
                        os.replace(part, target)
                finally:
                    part.unlink(missing_ok=True)
    except NoLocks as error:
        raise StoreError(
            f"cannot keep a copy of {path} in {folder}: its file system has no file locks "
            f"({error.strerror}); set TEACHERCACHE_CACHE to a folder on a disk of this machine"
        ) from error
    except OSError as error:
        raise StoreError(
            f"cannot keep a copy of {path} in {folder}: {error.strerror or error}; free or open "
            f"it, or set TEACHERCACHE_CACHE to another folder"
        ) from error


def _size_of(path: ObjectPath) -> int:
    info = path.info()
    if info is None:
        raise StoreError(
            f"{path} is missing: run `teachercache verify` on its folder, delete the manifest.json "
            f"there and run the recipe again"
        )
    return info.num_bytes


def _fetch(path: ObjectPath, file: Path, num_bytes: int, sha256: str) -> None:
    path.download(file, num_bytes)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise StoreError(
            f"{path} has sha256 {found[:12]}, its manifest says {sha256[:12]}: run "
            f"`teachercache verify` and mend that table first"
        )


def _held(target: Path) -> HeldFile | None:
    """Open and lock a copy, and note that it was used."""
    try:
        stream = target.open("rb")
    except FileNotFoundError:
        return None
    wait_for_lock(stream, fcntl.LOCK_SH)
    if os.fstat(stream.fileno()).st_nlink == 0:  # deleted between the two
        stream.close()
        return None
    os.utime(stream.fileno())
    return HeldFile(target, stream)


def _reserve(part: Path, num_bytes: int, spare_from_s: float | None) -> bool:
    """Make room for ``part`` and take it at once, at its whole size."""
    limit = cache_limit()
    with locked(part.parent / "room.lock"):
        files = {}
        for path in part.parent.iterdir():
            with suppress(FileNotFoundError):  # a part that has just got its name
                if path == part or path.suffix == ".lock":
                    continue
                if path.suffix == _PART and _is_abandoned(path, part):
                    path.unlink()
                else:
                    files[path] = path.stat()
        excess = sum(stat.st_size for stat in files.values()) + num_bytes - limit
        oldest = sorted(files, key=lambda path: files[path].st_mtime)
        spared = float("inf") if spare_from_s is None else spare_from_s
        removable = [path for path in oldest if files[path].st_mtime < spared]
        if excess > sum(files[path].st_size for path in removable if path.suffix != _PART):
            return False
        for path in removable:
            if excess <= 0:
                break
            if path.suffix != _PART and _remove_unused(path):
                excess -= files[path].st_size
        if excess > 0:
            return False
        with part.open("wb") as stream:
            stream.truncate(num_bytes)
        return True


def _is_abandoned(part: Path, ours: Path) -> bool:
    """Whether nobody is fetching this part, so that whoever began was killed."""
    if part.name[:2] == ours.name[:2]:  # its lock is the one that we hold
        return True
    with (part.parent / f"{part.name[:2]}.lock").open("a+b") as stream:
        return try_lock(stream, fcntl.LOCK_EX)


def _remove_unused(path: Path) -> bool:
    # NFS gives a lock that keeps others out to those alone who may write.
    with suppress(FileNotFoundError, PermissionError), path.open("r+b") as stream:
        if not try_lock(stream, fcntl.LOCK_EX):
            return False
        path.unlink()
        return True
    return not path.exists()
