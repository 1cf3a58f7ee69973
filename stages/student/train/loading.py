"""What a run begins with, loaded: a student or a distiller, a frozen reader, an adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from schemas.dataset import CachedDataset
from stages.models.causal_lm.model import (
    check_student,
    choose_attention,
    load_student,
    student_vocab_size,
)
from stages.models.causal_lm.packed_rows import require_packs
from stages.student.batches.demonstrations import check_rooms
from stages.student.distiller.distiller import load_distiller
from stages.student.distiller.reader import check_reader, load_reader
from stages.student.evaluate.positions import DTYPES
from stages.student.lora import adapt_student
from stages.student.train.stage import TrainConfig


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins with: a student or distiller, a frozen reader, an adapter to go on from."""

    student: Path
    reader: Path | None
    adapter: Path | None


def load_start(
    start: Start, config: TrainConfig, read: Sequence[CachedDataset], device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Return what is trained on ``read``, and the frozen reader if the objective uses one."""
    student, reader = start.student, start.reader
    if reader is None:
        model = load_student(student, device=device)
        if config.packing:
            require_packs(model, f"student {student}")
        if (chosen := config.attn_implementation) != "sdpa":
            choose_attention(model, chosen, f"student {student}")
        for dataset in read:
            check_student(student, dataset, student_vocab_size(model))
        if (lora := config.lora) is not None:
            seed, name = config.seed, f"student {student}"
            adapt_student(model, lora, seed=seed, begin=start.adapter, name=name)
        return model, None
    (dataset,) = read
    distiller = load_distiller(student, device=device)
    frozen = load_reader(reader, device=device, dtype=DTYPES[config.dtype])
    check_student(student, dataset, distiller.vocab_size)
    check_student(reader, dataset, student_vocab_size(frozen))
    check_reader(distiller, frozen, reader)
    check_rooms(distiller, frozen, dataset)
    return distiller, frozen
