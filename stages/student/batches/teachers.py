"""Rows that have several teachers, or each its own data set's -> batches.

The token part of a batch is that of ``signals``. Its rows are put in the order of their data sets,
so that the positions of one data set lie side by side, and ``taught`` has an entry for each of
those that the batch has rows of: ``stop``, where its positions end, and ``teachers``, one entry for
each of its tables: ``table``, its place in the data, and what ``signals`` decodes of it.

Dimensions: N = scored positions of the batch, of one data set in ``taught``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from schemas.dataset import TEACHERS
from stages.student.batches.several_datasets import DATA_SET, SeveralDatasets
from stages.student.batches.signals import Collator, Row

TAUGHT = "taught"


@dataclass(frozen=True, slots=True)
class TaughtCollator:
    """``tokens`` decodes ids alone; ``teachers`` are the tables of each data set: place, decoder.

    Nothing is shuffled but rows within their batch: which rows a batch has is not decided here.
    """

    tokens: Collator
    teachers: tuple[tuple[tuple[int, Collator], ...], ...]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return one batch."""
        rows = sorted(rows, key=_data_set)
        taught, stop = [], 0
        for which, own in groupby(rows, key=_data_set):
            of_teachers = zip(*(row[TEACHERS] for row in own), strict=True)
            told: list[dict[str, Any]] = []
            for (table, collator), columns in zip(self.teachers[which], of_teachers, strict=True):
                decoded = collator.decoded(columns)
                tensors = {name: torch.from_numpy(each) for name, each in decoded.items()}
                told.append({"table": table, **tensors})
            stop += len(told[0]["teacher_next_logprobs_N"])
            taught.append({"stop": stop, "teachers": told})
        return self.tokens(rows) | {TAUGHT: taught}


def _data_set(row: Row) -> int:
    return int(row[DATA_SET])


def taught_collator(
    dataset: SeveralDatasets, tokens: Collator, num_token_ids: int | None
) -> TaughtCollator:
    """Return what makes batches of these rows; ``tokens`` says the student's vocabulary."""
    teachers, place = [], 0
    for own in dataset.data_sets:
        found = []
        for manifest in own.manifests:
            if manifest.table == "teacher_logits":
                encoding: Any = manifest.variant
                decoder = replace(tokens, encoding=encoding, num_token_ids=num_token_ids)
                found.append((place, decoder))
            place += 1
        teachers.append(tuple(found))
    return TaughtCollator(tokens, tuple(teachers))


def on_device(value: Any, device: torch.device) -> Any:
    """Return a batch, or a part of one, with its tensors on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: on_device(each, device) for name, each in value.items()}
    return [on_device(each, device) for each in value] if isinstance(value, list) else value
