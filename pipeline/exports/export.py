"""Write finished tables in another trainer's format: opened, checked, and whole or not there.

An export is made in ``FOLDER.unfinished`` and takes its name when every byte of it is on the disk.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.exports import FORMATS
from pipeline.exports.written import Written
from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError, StoreError, first_line
from schemas.storage.file_locks import NoLocks, try_lock
from schemas.storage.files import Folder
from schemas.storage.manifest import read_manifest


def export_tables(
    tables: Sequence[Folder], to: str, folder: Folder, *, split: str | None, k: int | None
) -> tuple[Written, int]:
    """Export joined tables; return what was written, and how many rows no signal was there for.

    Raises ConfigError for an unknown format, a folder that is there already, and tables that the
    format cannot hold; StoreError where they are damaged or the disk refuses.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to is '{to}', expected one of {', '.join(FORMATS)}")
    if not isinstance(folder, Path):
        raise ConfigError(
            f"{folder} is in an object store, exports are written on this machine: name a folder "
            f"here and copy it"
        )
    if folder.exists():
        raise ConfigError(
            f"{folder} is there already, and no export is written over: delete it, or name another"
        )
    splits = _opened(tables, split)
    with _work_folder(folder) as work:
        written = FORMATS[to](splits, work, k)
    return written, sum(dataset.num_missing for dataset in splits.values())


def _opened(tables: Sequence[Folder], split: str | None) -> dict[str, CachedDataset]:
    """Open each split that the first table has rows in; checksums are verified once."""
    shards = read_manifest(tables[0]).shards
    there = list(dict.fromkeys(shard.split for shard in shards if shard.num_rows))
    if split is not None and split not in there:
        raise ConfigError(f"--split is '{split}', {tables[0]} has {' and '.join(there) or 'none'}")
    names = there if split is None else [split]
    return {name: open_dataset(tables, split=name, verify=name == names[0]) for name in names}


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder, which becomes ``folder`` if the block ends well."""
    work = folder.with_name(f"{folder.name}.unfinished")
    if work.is_dir() and any(work.iterdir()) and not (work / _LOCK).exists():
        raise ConfigError(
            f"{work} is there, and no export made it: move it away, or name another folder"
        )
    try:
        with _locked(work):
            for left in work.iterdir():
                if left.name != _LOCK:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield work
            _sync(work)
            (work / _LOCK).unlink()
            work.rename(folder)
    except OSError as error:
        raise StoreError(
            f"cannot write {folder}: {error.strerror or first_line(error)}; run the export again, "
            f"what is left in {work.name} is made anew"
        ) from error
    except ConfigError:  # nothing was begun
        with suppress(OSError):
            shutil.rmtree(work)
        raise


_LOCK = "export.lock"


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK).open("a+b") as stream:
        with suppress(NoLocks):
            if not try_lock(stream, fcntl.LOCK_EX):
                raise StoreError(f"another export is writing {work}: let it end, or name another")
        yield


def _sync(folder: Path) -> None:
    """Have every file on the disk before the folder takes its name."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(place, name), "rb") as stream:
                os.fsync(stream.fileno())
