"""The sha256 of a file that is read whole once, and then only when it is another one."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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


def remembered_sha256_of_all(paths: Sequence[Path]) -> list[str]:
    """Return what ``remembered_sha256`` does of each; as many at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(remembered_sha256, paths))
