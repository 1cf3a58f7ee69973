"""Vectors of a task, made once and kept in a safetensors file that names the reader they are for.

``vectors`` is [M, R]. The file's metadata has one entry, ``vectors_of``, in JSON: ``reader`` and
``distiller`` by content, the ``task``, and ``sample_id``, the row of ``demonstrations`` that was
read. (Of several entries safetensors 0.8 fixes no order, and equal files would differ.)

Dimensions: M = vectors, R = the reader's width.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError, StoreError
from schemas.storage.files import Folder, atomic_file
from schemas.tables.demonstrations import DEMONSTRATIONS
from stages.models.causal_lm.model import check_student
from stages.models.checkpoints.checkpoint import run_fingerprint, weight_checksums
from stages.student.distiller.distiller import Distiller, load_distiller
from stages.student.distiller.reader import reader_fingerprint

NOTES = "vectors_of"


@dataclass(frozen=True, slots=True)
class TaskVectors:
    """The file of one task's vectors, and how many tokens of demonstrations they are of."""

    file: Path
    task: str
    num_demonstrations: int
    num_tokens: int


def make_task_vectors(
    distiller: Path,
    data: Folder,
    tasks: Sequence[str],
    output: Path,
    *,
    split: str = "heldout",
    sample: str | None = None,
) -> list[TaskVectors]:
    """Write the vectors of each task (none named: of all) into ``output``, a file a task.

    Of a task's rows the one with the smallest sample_id is read; or the row ``sample`` alone, by
    its sample_id, and then the file of one that has no task is called by that. Raises ConfigError
    for a task or a sample that the table does not have, IdentityMismatch for a table of another
    tokenizer.
    """
    rows = _rows_by_task(data, split) if sample is None else _row_of(data, split, sample)
    unknown = [task for task in tasks if task not in rows]
    if unknown or not rows:
        raise ConfigError(
            f"{data} has no {split} row of task '{unknown[0] if unknown else ''}'; there are: "
            f"{', '.join(sorted(rows)) or 'no tasks, it was made of documents'}"
        )
    model = load_distiller(distiller, device=torch.device("cpu")).eval()
    check_student(distiller, open_dataset([data], verify=False), model.vocab_size)
    name = run_fingerprint({"weights": weight_checksums(distiller)})
    output.mkdir(parents=True, exist_ok=True)
    made = []
    for task in tasks or sorted(rows):
        row = rows[task]
        notes = {"reader": model.config.reader, "distiller": name, "task": task}
        called = re.sub(r"[^A-Za-z0-9._-]", "_", task) or row["sample_id"]
        file = output / f"{called}.safetensors"
        _write(file, vectors_of(model, row), notes | {"sample_id": row["sample_id"]})
        shown = int(row["num_distiller_demonstrations"])
        made.append(TaskVectors(file, task, shown, len(row["distiller_ids_L"])))
    return made


@torch.inference_mode()
def vectors_of(distiller: Distiller, row: Mapping[str, Any]) -> Tensor:
    """Return [M, R] of one row's demonstrations; raises ConfigError where they are too long."""
    ids_L = torch.from_numpy(row["distiller_ids_L"].astype("int64"))
    if distiller.window is not None and len(ids_L) > distiller.window:
        raise ConfigError(
            f"sample {row['sample_id']} has {len(ids_L)} tokens of demonstrations, the distiller "
            f"has room for {distiller.window}: lower distiller_tokens of the step that made it"
        )
    vectors_BMR: Tensor = distiller(ids_L[None], torch.tensor([len(ids_L)]))
    return vectors_BMR[0]


def read_vectors(file: Path, *, reader: Path) -> Tensor:
    """Return [M, R] float32; raises ConfigError where they are another reader's than this folder's.

    Raises StoreError for a file that cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            notes = json.loads((tensors.metadata() or {}).get(NOTES, "{}"))
            vectors_MR: Tensor = tensors.get_tensor("vectors")
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(
            f"cannot read vectors from {file} ({error}): make them with `teachercache mend vectors`"
        ) from error
    found, expected = notes.get("reader", ""), reader_fingerprint(reader)
    if found != expected:
        raise ConfigError(
            f"{file} has vectors for reader {found[:12]}, {reader} is {expected[:12]}: use that "
            f"reader, or make vectors with a distiller for this one"
        )
    return vectors_MR


def _opened(data: Folder, split: str) -> CachedDataset:
    dataset = open_dataset([data], split=split, verify=False)
    if dataset.manifests[0].table != DEMONSTRATIONS.name:
        raise ConfigError(
            f"{data} is a table of {dataset.manifests[0].table}, expected {DEMONSTRATIONS.name}: "
            f"name the folder that a step of that stage wrote"
        )
    return dataset


def _rows_by_task(data: Folder, split: str) -> dict[str, Mapping[str, Any]]:
    dataset = _opened(data, split)
    found: dict[str, Mapping[str, Any]] = {}
    for row in (dataset[index] for index in range(len(dataset))):
        first = found.setdefault(row["task"], row)
        if row["sample_id"] < first["sample_id"]:
            found[row["task"]] = row
    found.pop("", None)
    return found


def _row_of(data: Folder, split: str, sample: str) -> dict[str, Mapping[str, Any]]:
    dataset = _opened(data, split)
    for row in (dataset[index] for index in range(len(dataset))):
        if row["sample_id"] == sample:
            return {row["task"]: row}
    raise ConfigError(
        f"{data} has no {split} row with sample_id {sample}: `teachercache inspect` shows what "
        f"there is"
    )


def _write(file: Path, vectors_MR: Tensor, notes: Mapping[str, str]) -> None:
    said = {NOTES: json.dumps(notes, sort_keys=True)}
    with atomic_file(file) as stream:
        stream.write(save({"vectors": vectors_MR.float().contiguous()}, metadata=said))
