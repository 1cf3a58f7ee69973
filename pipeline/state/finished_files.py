"""The files that a finished step names as its own: what they weigh, and which are gone.

None of them is opened or hashed: ``teachercache verify`` does that.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from pipeline.planning.plan import PlannedStep
from pipeline.state.step_state import finished_manifest
from schemas.storage.files import Folder, at_once
from schemas.storage.object_path import ObjectPath
from schemas.storage.records import listed_shards, shard_name
from schemas.storage.shard_list import SHARD_LIST
from stages.models.checkpoints.checkpoint import CHECKPOINT, read_record

SHARD_SUFFIX = ".arrow"


@dataclass(frozen=True, slots=True)
class FinishedFiles:
    """Bytes of the files that are there, and the names of those that have gone."""

    num_bytes: int
    missing: tuple[str, ...] = ()


def finished_files(step: PlannedStep) -> FinishedFiles | None:
    """Look for each file of a step that was finished; None for one that never was.

    Shards weigh what the manifest says, and in a folder one listing says which are there. A store
    is not asked for its shards, nor for a list: a million of them are as many requests.
    """
    if not step.writes_table:
        finished = (step.place / CHECKPOINT).is_file()
        return _look_for(step.place, read_record(step.place).files) if finished else None
    manifest = finished_manifest(step)
    if manifest is None:
        return None
    beside = _look_for(step.place, manifest.files)  # heads, say
    shard_list = _look_for(step.place, [SHARD_LIST])
    missing = *_missing_shards(step.place, len(manifest.shards)), *shard_list.missing
    return FinishedFiles(manifest.num_bytes + beside.num_bytes, (*missing, *beside.missing))


def _missing_shards(folder: Folder, num_shards: int) -> list[str]:
    if isinstance(folder, ObjectPath):
        return []
    there = listed_shards(folder, num_shards, SHARD_SUFFIX)
    return [shard_name(int(i), num_shards) + SHARD_SUFFIX for i in np.flatnonzero(~there)]


def _look_for(folder: Folder, names: Collection[str]) -> FinishedFiles:
    sizes = dict(zip(names, at_once(_size_of, [folder / name for name in names]), strict=True))
    missing = tuple(name for name, size in sizes.items() if size is None)
    return FinishedFiles(sum(size or 0 for size in sizes.values()), missing)


def _size_of(path: Folder) -> int | None:
    if isinstance(path, ObjectPath):
        info = path.info()
        return None if info is None else info.num_bytes
    return path.stat().st_size if path.is_file() else None
