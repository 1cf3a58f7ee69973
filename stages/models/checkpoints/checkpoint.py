"""What a finished checkpoint step leaves: ``checkpoint.json``, written last, and what it names.

A model folder made by a step (a new student, a trained one) is finished when this file exists; it
names the checksum of every other file. Needs no torch, so ``plan`` and ``verify`` can read it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, StoreError
from schemas.storage.files import Folder, read_if_there, require_below, sha256_of, write_text
from schemas.storage.shard_cache import local_files
from stages.models.checkpoints.tokenizer_identity import TEMPLATE_FOLDER

CHECKPOINT = "checkpoint.json"
METRICS = "metrics.json"
CHECKPOINTS = "checkpoints"
RUN = "run.json"
WHOLE = "whole"
EVALUATION = "evaluation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A finished step: its identity, its results, and the checksum of each file of the folder.

    ``history`` is what a run logged, the same however often it was killed; ``speeds``, by step,
    are of the clock.
    """

    fingerprint: str
    identity: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    history: tuple[Mapping[str, float], ...] = ()
    speeds: Sequence[Mapping[str, float]] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def weight_checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of each weight file of a model folder."""
    files = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
    return {path.name: sha256_of(path) for path in files}


def run_fingerprint(identity: Mapping[str, Any]) -> str:
    """Return a hash of a run's identity, for a caller that has no fingerprint of its own."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def equal_modes(folder: Path) -> None:
    """Let whoever may read a model's configuration read all of its files, its weights too.

    safetensors writes for its owner alone.
    """
    configs = (folder / "config.json", folder / "adapter_config.json")
    config = next(path for path in configs if path.is_file())
    for path in folder.rglob("*"):
        if path.is_file():
            shutil.copymode(config, path)


def write_checkpoint(folder: Path, record: CheckpointRecord) -> None:
    """Force the folder's files to disk, then declare it complete."""
    files = {}
    for path in [*sorted(folder.iterdir()), *sorted((folder / TEMPLATE_FOLDER).glob("*"))]:
        if path.is_file() and path.name != CHECKPOINT and path.name[0] != ".":
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
            files[path.relative_to(folder).as_posix()] = sha256_of(path)
    body = asdict(record) | {"files": files}
    write_text(folder / CHECKPOINT, json.dumps(body, indent=1, sort_keys=True) + "\n")


def write_evaluation(folder: Path, body: Mapping[str, Any], record: CheckpointRecord) -> None:
    """Write a report, ``evaluation.json`` with every number, then its record."""
    write_text(folder / EVALUATION, json.dumps(body, indent=1) + "\n")
    write_checkpoint(folder, record)


def read_checkpoint(folder: Folder) -> CheckpointRecord | None:
    """Return a finished step's record; None where there is none or one of its files has gone.

    Raises StoreError if the record is damaged. Checksums are not compared: ``damaged_files`` does.
    """
    text = read_if_there(folder / CHECKPOINT)
    if text is None:
        return None
    record = _parsed(folder, text)
    return record if all((folder / name).is_file() for name in record.files) else None


def read_record(folder: Folder) -> CheckpointRecord:
    """Read ``checkpoint.json`` alone; raises StoreError if it is damaged or not there."""
    text = read_if_there(folder / CHECKPOINT)
    if text is None:
        raise StoreError(
            f"{folder} is not finished: it has no {CHECKPOINT}; run the recipe that makes it "
            f"(`teachercache run`) and try again"
        )
    return _parsed(folder, text)


def _parsed(folder: Folder, text: bytes) -> CheckpointRecord:
    try:
        body = json.loads(text)
        require_below(body.get("files", ()))
        return CheckpointRecord(history=tuple(body.pop("history")), **body)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"{folder / CHECKPOINT} is damaged ({error}): delete it and run again"
        ) from error


def local_copy(folder: Folder) -> Path:
    """Return a finished step's folder on this machine: from a store, its files in the cache."""
    return folder if isinstance(folder, Path) else local_files(folder, read_record(folder).files)


def damaged_files(folder: Folder, record: CheckpointRecord) -> list[str]:
    """Return one line for each file of a finished step that is missing or has changed."""
    problems = []
    for name, sha256 in record.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif sha256_of(path) != sha256:
            problems.append(f"{path} has changed since it was written")
    return problems


def require_whole(folder: Path) -> None:
    """Raise StoreError where a finished step's files are no longer those of its record.

    Any other folder, which nobody recorded, is taken as it is. Cost: all files are hashed.
    """
    if not (folder / CHECKPOINT).is_file():
        return
    if problems := damaged_files(folder, read_record(folder)):
        raise StoreError(
            f"{problems[0]} ({len(problems)} in all), so this model is not the one that was made: "
            f"delete {folder} and run its recipe again"
        )


def claim_folder(output: Path, fingerprint: str, *, resume: bool) -> None:
    """Raise ConfigError when ``output`` holds another run, finished or not."""
    finished = read_checkpoint(output)
    if finished is not None and finished.fingerprint != fingerprint:
        raise ConfigError(_taken(output, finished.fingerprint, fingerprint))
    run = output / CHECKPOINTS / RUN
    if resume and run.is_file():
        found = json.loads(run.read_text())["fingerprint"]
        if found != fingerprint:
            raise ConfigError(_taken(output, found, fingerprint))


def _taken(output: Path, found: str, expected: str) -> str:
    return (
        f"{output} holds training {found[:12]}, this one is {expected[:12]} (another config, data "
        f"or student): choose another output folder"
    )


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that every process saved its part of, however many they were."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in found if _is_whole(path)]
    return whole[-1] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    if not (checkpoint / WHOLE).is_file():
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
