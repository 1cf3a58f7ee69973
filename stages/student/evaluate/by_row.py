"""What each held-out row comes to: means over its positions, a line a student and row of a file.

``rows.arrow`` (Arrow IPC) stands beside ``evaluation.json``: columns ``student``, ``sample_id``,
``positions``, ``cross_entropy`` and ``kl_to_teacher`` (null without a teacher), in nats a position.
Students of one report have the same rows in the same order, so their differences are paired.

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
SCHEMA = pa.schema(
    [
        pa.field("student", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("positions", pa.int32(), nullable=False),
        pa.field("cross_entropy", pa.float64(), nullable=False),
        pa.field("kl_to_teacher", pa.float64()),
    ]
)


@dataclass(slots=True)
class RowScores:
    """The rows of one student as batches come; each batch row is one row of the data."""

    sample_ids: list[str] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    cross_entropies: list[float] = field(default_factory=list)
    kls: list[float | None] = field(default_factory=list)

    def add(self, batch: Mapping[str, Any], scores_N2: Tensor, *, has_teacher: bool) -> None:
        """Add a batch by the cross-entropy and the KL [N, 2] of its positions."""
        ids: Sequence[str] = batch[SAMPLE_IDS]
        row_of_N = (batch["positions_N"] // batch["input_ids"].shape[1]).cpu()
        sums_B2 = torch.zeros(len(ids), 2, dtype=torch.float64)
        sums_B2.index_add_(0, row_of_N, scores_N2.double().cpu())
        counts_B = torch.bincount(row_of_N, minlength=len(ids))
        means_B2 = sums_B2 / counts_B.clamp(min=1)[:, None]
        self.sample_ids += ids
        self.positions += counts_B.tolist()
        self.cross_entropies += means_B2[:, 0].tolist()
        self.kls += means_B2[:, 1].tolist() if has_teacher else [None] * len(ids)


@dataclass(frozen=True, slots=True)
class WithSampleIds:
    """Batches of another collator with their rows' names."""

    collator: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch with ``sample_ids``."""
        return {**self.collator(rows), SAMPLE_IDS: [row["sample_id"] for row in rows]}


def write_rows(folder: Path, scores: Mapping[str, RowScores]) -> None:
    """Write ``rows.arrow``, student after student."""
    with pa.OSFile(str(folder / ROWS), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for student, found in scores.items():
            names = [student] * len(found.sample_ids)
            columns = [
                *(names, found.sample_ids, found.positions),
                *(found.cross_entropies, found.kls),
            ]
            arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))


def read_rows(folder: Path) -> pa.Table:
    """Read the ``rows.arrow`` of a finished report."""
    with pa.memory_map(str(folder / ROWS)) as source:
        return pa.ipc.open_file(source).read_all()
