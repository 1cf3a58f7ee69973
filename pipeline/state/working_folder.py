"""Where a step that makes a folder of files works: in its own folder, or on this machine first.

A step whose folder lies in an object store works in ``$TEACHERCACHE_CACHE/work`` under a name that
its place gives it, so that a killed run finds there what it had. What it made is uploaded file by
file when all of it is whole, ``checkpoint.json`` last.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import StoreError
from schemas.storage.files import Folder
from schemas.storage.object_path import ObjectPath
from schemas.storage.shard_cache import user_cache
from stages.models.checkpoints.checkpoint import CHECKPOINT, read_checkpoint


def working_folder(folder: Folder) -> Path:
    """Return the folder of this machine that stands for a step's; it is there."""
    if isinstance(folder, ObjectPath):
        key = hashlib.sha256(folder.url.encode()).hexdigest()[:16]
        folder = user_cache() / "work" / f"{folder.name}-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot work in {folder}: {error.strerror}; make it writable") from error
    return folder


@contextmanager
def published(folder: Folder) -> Iterator[Path]:
    """Give the folder to work in; what the block leaves there, finished, is a step's result."""
    local = working_folder(folder)
    yield local
    if isinstance(folder, ObjectPath):
        upload_checkpoint(local, folder)
        remove_work(folder)


def upload_checkpoint(local: Path, folder: ObjectPath) -> None:
    """Upload a finished step's files, those that are there already left out, its record last."""
    record = read_checkpoint(local)
    assert record is not None, "a step ends with its record"
    for name, sha256 in record.files.items():
        info = (folder / name).info()
        if info is None or info.sha256 != sha256:
            (folder / name).upload(local / name)
    (folder / CHECKPOINT).upload(local / CHECKPOINT)


def remove_work(folder: Folder) -> None:
    """Free what a step in an object store needed on this machine."""
    if isinstance(folder, ObjectPath):
        shutil.rmtree(working_folder(folder), ignore_errors=True)
