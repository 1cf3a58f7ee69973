"""Finished tables that a step's would equal but for its input, and which of their rows it can take.

A row can be taken where the input has the same row: the same ``sample_id``, and every column the
same but the side that it is on, which no signal reads. The other table's own input says so, hence
it has to be there. All else that moves bytes (settings, version, models, table) is in the identity,
and equal; the tokenizer is compared beside it.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.planning.fingerprint import ADDRESS_DIGITS
from pipeline.planning.plan import PlannedStep
from schemas.errors import TeacherCacheError
from schemas.open_table import known_table, open_table
from schemas.storage.files import Folder
from schemas.storage.manifest import MANIFEST, Manifest, damaged_shards, manifest_if_there
from schemas.storage.object_path import ObjectPath
from schemas.storage.shards import read_verified
from schemas.table import Table
from stages.signals.teacher_logits.calibration import CALIBRATION, read_calibration
from stages.stage import TableStage


@dataclass(frozen=True, slots=True)
class Predecessor:
    """A finished table, and the one that it was made of."""

    folder: Folder
    manifest: Manifest
    input_folder: Folder
    input_manifest: Manifest

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield key and digest of the input of each row that the table has."""
        if not self.manifest.num_rows:
            return
        kept = set(open_table(self.folder, split=None, verify=False).sample_ids().tolist())
        for shard in self.input_manifest.shards:
            rows = read_verified(self.input_folder / shard.file, shard.sha256)
            table = known_table(self.input_manifest, self.input_folder)
            for key, digest in digests_of(rows, table):
                if key in kept:
                    yield key, digest


def predecessors(
    step: PlannedStep,
    source: Manifest,
    roots: Sequence[Folder],
    *,
    warned: Callable[[str], None],
) -> list[Predecessor]:
    """Return the tables below some roots whose rows a step can take, the largest first.

    ``warned`` is told of one that is damaged or whose input has gone. Of tables whose tau was found
    (``mean_k``) all have the same one.
    """
    found: dict[str, Predecessor] = {}
    for root in roots:
        for folder in _tables_in(root / step.place.parent.name):
            one = _predecessor(folder, root, step, source, warned)
            if one is not None:
                found.setdefault(one.manifest.dataset_id, one)
    largest = sorted(found.values(), key=lambda one: (-one.manifest.num_rows, str(one.folder)))
    if not is_calibrated(step):
        return largest
    own, theirs = read_calibration(step.place), [read_calibration(one.folder) for one in largest]
    wanted = own or next(filter(None, theirs), None)
    pairs = zip(largest, theirs, strict=True)
    return [one for one, found in pairs if found and wanted and found.tau == wanted.tau]


def is_calibrated(step: PlannedStep) -> bool:
    """Whether the step's table has a tau that is found (``mean_k``)."""
    return isinstance(step.stage, TableStage) and CALIBRATION in step.stage.side_files


def _tables_in(group: Folder) -> list[Folder]:
    if isinstance(group, ObjectPath):
        return sorted(
            (path.parent for path in group.find() if path.name == MANIFEST and _is_table(path)),
            key=str,
        )
    if not group.is_dir():
        return []
    return sorted(path for path in group.iterdir() if path.is_dir() and not path.is_symlink())


def _is_table(manifest: ObjectPath) -> bool:
    return len(manifest.parent.name) == ADDRESS_DIGITS


def _predecessor(
    folder: Folder,
    root: Folder,
    step: PlannedStep,
    source: Manifest,
    warned: Callable[[str], None],
) -> Predecessor | None:
    try:
        manifest = manifest_if_there(folder)
        if manifest is None or not _is_like(manifest, step, source):
            return None
        (made_of,) = manifest.identity["inputs"]
        input_folder = root / source.table / made_of[:ADDRESS_DIGITS]
        input_manifest = manifest_if_there(input_folder)
        if input_manifest is None or input_manifest.fingerprint != made_of:
            warned(
                f"{folder} differs from '{step.name}' by its input alone, but that input "
                f"({input_folder}) has gone: no row is copied, as none can be compared"
            )
            return None
        if (input_manifest.version, input_manifest.variant) != (source.version, source.variant):
            return None
        damaged = damaged_shards(folder, manifest) if isinstance(folder, Path) else []
        if damaged:
            warned(f"{damaged[0]}: no row of {folder} is copied; repair it and run again")
            return None
    except TeacherCacheError as error:
        warned(f"no row of {folder} is copied: {error}")
        return None
    return Predecessor(folder, manifest, input_folder, input_manifest)


def _is_like(manifest: Manifest, step: PlannedStep, source: Manifest) -> bool:
    """Whether a table's identity is the step's but for one input."""
    if manifest.fingerprint == step.fingerprint or manifest.tokenizer != source.tokenizer:
        return False
    inputs = manifest.identity.get("inputs")
    is_of_one = isinstance(inputs, list) and len(inputs) == 1 and isinstance(inputs[0], str)
    return is_of_one and _but_inputs(manifest.identity) == _but_inputs(step.identity)


def _but_inputs(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "inputs"}


def digests_of(rows: pa.Table, table: Table[Any]) -> Iterator[tuple[bytes, bytes]]:
    """Yield key and digest of each row of an input; the digest is of all columns but ``split``."""
    names = [name for name in table.columns if name not in ("sample_id", "split")]
    for batch in rows.to_batches():
        keys = table.column_values(batch, "sample_id")
        columns = [table.column_values(batch, name) for name in names]
        for key, values in zip(keys, zip(*columns, strict=True), strict=True):
            yield key.encode(), _digest(values)


def _digest(values: Sequence[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        array = isinstance(value, np.ndarray)
        shown = f"{value.dtype.str}{value.shape}" if array else repr(value)
        digest.update(f"{len(shown)}:{shown}".encode())
        if array:
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.digest()
