"""Finished tables that a step's would equal but for its input, and which of their rows it can take.

A row can be taken where the input has the same row: the same ``sample_id``, and every column the
same but the side that it is on, which no signal reads. The other table's own input says so, hence
it has to be there. All else that moves bytes (settings, version, models, table) is in the identity,
and equal; the tokenizer is compared beside it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.planning.fingerprint import ADDRESS_DIGITS
from pipeline.planning.plan import PlannedStep
from pipeline.steps.wanted_rows import WantedRows
from schemas.errors import TeacherCacheError
from schemas.open_table import open_table
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest, damaged_shards, manifest_if_there
from schemas.storage.object_path import ObjectPath
from stages.signals.teacher_logits.calibration import CALIBRATION, read_calibration
from stages.stage import TableStage

Warned = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Predecessor:
    """A finished table, and the one that it was made of."""

    folder: Folder
    manifest: Manifest
    input_folder: Folder
    input_manifest: Manifest


def take_rows(
    wanted: WantedRows,
    step: PlannedStep,
    source: Manifest,
    roots: Sequence[Folder],
    *,
    warned: Warned,
) -> list[tuple[Predecessor, int]]:
    """Find wanted rows in tables below some roots, the largest first, until none is left.

    Returns each table that has some, by its number in ``wanted``, with how many. ``warned`` is told
    of one that is damaged or whose input has gone. Where a tau was found (``mean_k``) it is one for
    all: that of the step, if it has one, else of the first table that serves.
    """
    serving: list[tuple[Predecessor, int]] = []
    tau = _tau_of(step.place) if is_calibrated(step) else None
    for one in _predecessors(step, source, roots, warned):
        if not wanted.num_new:
            break
        try:
            theirs = _tau_of(one.folder) if is_calibrated(step) else None
            if is_calibrated(step) and (theirs is None or tau not in (None, theirs)):
                continue
            count = _taken(wanted, one, len(serving), warned)
        except TeacherCacheError as error:
            warned(f"no row of {one.folder} is copied: {error}")
            continue
        if count:
            serving.append((one, count))
            tau = theirs
    return serving


def is_calibrated(step: PlannedStep) -> bool:
    """Whether the step's table has a tau that is found (``mean_k``)."""
    return isinstance(step.stage, TableStage) and CALIBRATION in step.stage.side_files


def _tau_of(folder: Folder) -> float | None:
    found = read_calibration(folder)
    return None if found is None else found.tau


def _taken(wanted: WantedRows, one: Predecessor, number: int, warned: Warned) -> int:
    """Take what a table has; its bytes are looked at only where its input has something wanted."""
    if not one.manifest.num_rows:
        return 0
    matching = wanted.matching(one.input_folder, one.input_manifest)
    if not len(matching):
        return 0
    if isinstance(one.folder, Path) and (damaged := damaged_shards(one.folder, one.manifest)):
        warned(f"{damaged[0]}: no row of {one.folder} is copied; repair it and run again")
        return 0
    table = open_table(one.folder, split=None, verify=False)
    return wanted.take(matching, number, table.sample_ids())


def _predecessors(
    step: PlannedStep, source: Manifest, roots: Sequence[Folder], warned: Warned
) -> list[Predecessor]:
    groups = [root / step.place.parent.name for root in roots]
    assert isinstance(step.stage, TableStage)
    names = dict.fromkeys([source.table, *(table.name for table in step.stage.CONSUMES)])
    inputs = [root / name for name in names for root in roots]
    inputs.append(step.inputs[0].place.parent)
    found: dict[str, Predecessor] = {}
    for folder in (folder for group in groups for folder in _tables_in(group)):
        one = _predecessor(folder, inputs, step, source, warned)
        if one is not None:
            found.setdefault(one.manifest.dataset_id, one)
    return sorted(found.values(), key=lambda one: (-one.manifest.num_rows, str(one.folder)))


def _tables_in(group: Folder) -> list[Folder]:
    if isinstance(group, ObjectPath):
        return [path for path in group.folders() if len(path.name) == ADDRESS_DIGITS]
    if not group.is_dir():
        return []
    return sorted(path for path in group.iterdir() if path.is_dir() and not path.is_symlink())


def _predecessor(
    folder: Folder,
    inputs: Sequence[Folder],
    step: PlannedStep,
    source: Manifest,
    warned: Warned,
) -> Predecessor | None:
    try:
        manifest = manifest_if_there(folder)
        if manifest is None or not _is_like(manifest, step, source):
            return None
        (made_of,) = manifest.identity["inputs"]
        read = next(_with_fingerprint(made_of, inputs), None)
    except TeacherCacheError as error:
        warned(f"no row of {folder} is copied: {error}")
        return None
    if read is None:
        warned(
            f"{folder} differs from '{step.name}' by its input alone, but that input "
            f"({made_of[:ADDRESS_DIGITS]}) has gone: no row is copied, as none can be compared"
        )
        return None
    input_folder, found = read
    if _kind_of(found) != _kind_of(source):
        return None
    return Predecessor(folder, manifest, input_folder, found)


def _kind_of(manifest: Manifest) -> tuple[str, int, str]:
    return manifest.table, manifest.version, manifest.variant


def _with_fingerprint(
    fingerprint: str, groups: Sequence[Folder]
) -> Iterator[tuple[Folder, Manifest]]:
    """Yield the finished tables of a fingerprint right below some folders."""
    for group in groups:
        folder = group / fingerprint[:ADDRESS_DIGITS]
        manifest = manifest_if_there(folder)
        if manifest is not None and manifest.fingerprint == fingerprint:
            yield folder, manifest


def _is_like(manifest: Manifest, step: PlannedStep, source: Manifest) -> bool:
    """Whether a table's identity is the step's but for one input."""
    if manifest.fingerprint == step.fingerprint or manifest.tokenizer != source.tokenizer:
        return False
    inputs = manifest.identity.get("inputs")
    is_of_one = isinstance(inputs, list) and len(inputs) == 1 and isinstance(inputs[0], str)
    return is_of_one and _but_inputs(manifest.identity) == _but_inputs(step.identity)


def _but_inputs(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "inputs"}
