"""What is read of files again and again, by content: worked out once, then remembered."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
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
    return _remembered(user_cache() / "sha256" / name, lambda: sha256_of(path), 64)


def remembered_sha256_of_all(paths: Sequence[Path]) -> list[str]:
    """Return what ``remembered_sha256`` does of each; as many at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(remembered_sha256, paths))


def remembered_of(
    what: str, rules: int, files: Sequence[Path], worked_out: Callable[[], str]
) -> str:
    """Return a line that depends on names and bytes of ``files`` alone, worked out when first seen.

    ``rules`` is raised when the same files give another line.
    """
    contents = [f"{path.name}:{remembered_sha256(path)}" for path in files]
    name = hashlib.sha256("\n".join([str(rules), *contents]).encode()).hexdigest()[:32]
    return _remembered(user_cache() / what / name, worked_out, 1)


def _remembered(memory: Path, worked_out: Callable[[], str], shortest: int) -> str:
    if memory.is_file() and len(known := memory.read_text().strip()) >= shortest:
        return known
    found = worked_out()
    with contextlib.suppress(StoreError):  # a cache that cannot be written costs time, no more
        write_text(memory, found + "\n")
    return found
