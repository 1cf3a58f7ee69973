"""What each held-out row comes to: a line a student and row of a file, to be paired by.

``rows.arrow`` (Arrow IPC) stands beside ``evaluation.json``. Of every table it has columns
``student`` and ``sample_id``; of text also ``positions``, and ``cross_entropy`` and
``kl_to_teacher`` (null without a teacher) as means over these, in nats; of episodes what
``icl_rows`` lists. Students of one report have the same rows in the same order, so their
differences are paired.

Dimensions: N = scored positions of a batch, B = rows of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

ROWS = "rows.arrow"
SAMPLE_IDS = "sample_ids"  # of a batch: those of its rows, in order
Row = Mapping[str, Any]


@dataclass(slots=True)
class RowScores:
    """The rows of one student as batches come; each batch row is one row of the data."""

    rows: list[Row] = field(default_factory=list)

    def add(self, batch: Mapping[str, Any], scores_N2: Tensor, *, has_teacher: bool) -> None:
        """Add a batch by the cross-entropy and the KL [N, 2] of its positions."""
        ids: Sequence[str] = batch[SAMPLE_IDS]
        row_of_N = (batch["positions_N"] // batch["input_ids"].shape[1]).cpu()
        sums_B2 = torch.zeros(len(ids), 2, dtype=torch.float64)
        sums_B2.index_add_(0, row_of_N, scores_N2.double().cpu())
        counts_B = torch.bincount(row_of_N, minlength=len(ids))
        means_B2 = sums_B2 / counts_B.clamp(min=1)[:, None]
        for name, count, (nll, kl) in zip(ids, counts_B.tolist(), means_B2.tolist(), strict=True):
            row = {"sample_id": name, "positions": count, "cross_entropy": nll}
            self.rows.append({**row, "kl_to_teacher": kl if has_teacher else None})


@dataclass(frozen=True, slots=True)
class WithSampleIds:
    """Batches of another collator with their rows' names."""

    collator: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch with ``sample_ids``."""
        return {**self.collator(rows), SAMPLE_IDS: [row["sample_id"] for row in rows]}


def write_rows(folder: Path, rows: Mapping[str, Sequence[Row]]) -> None:
    """Write ``rows.arrow``, student after student; nothing where no row was measured by itself."""
    lines = [{"student": name, **row} for name, found in rows.items() for row in found]
    if not lines:
        return
    names = dict.fromkeys(name for line in lines for name in line)
    table = pa.table({name: [line.get(name) for line in lines] for name in names})
    with pa.OSFile(str(folder / ROWS), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_rows(folder: Path) -> pa.Table:
    """Read the ``rows.arrow`` of a finished report."""
    with pa.memory_map(str(folder / ROWS)) as source:
        return pa.ipc.open_file(source).read_all()
