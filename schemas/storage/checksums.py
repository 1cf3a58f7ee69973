"""Checksums of files that are asked for again and again: hashed once, then remembered."""

import contextlib
import hashlib
from pathlib import Path

from ..errors import StoreError
from .files import sha256_of, write_text
from .shard_cache import user_cache


def remembered_sha256(path: Path) -> str:
    """Return a file's sha256, hashing it only when its path, size or times are new.

    The time of the last change of any kind counts too: a copy that keeps the time of writing
    (``cp -p``, ``rsync -t``) over a file of the same size moves only that one.
    """
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    memory = user_cache() / "sha256" / name
    if memory.is_file() and len(known := memory.read_text().strip()) == 64:
        return known
    found = sha256_of(path)
    with contextlib.suppress(StoreError):  # a cache that cannot be written costs time, no more
        write_text(memory, found + "\n")
    return found
