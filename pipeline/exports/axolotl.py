"""Format ``axolotl``: rows with the columns of axolotl's knowledge distillation, for its trainer.

Columns and places are those that its collator and loss read (commit 067b021, ``integrations/kd``):
the loss shifts labels and not the teacher's columns, so an entry lies one token before the one it
is about. As its own loader does, log-probs are made to sum to one over the K tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.exports.datasets_folder import save_to_disk
from pipeline.exports.list_columns import lists, record_batches
from pipeline.exports.token_aligned import Array, token_aligned
from pipeline.exports.top_k_columns import lost_of, top_k_rows
from pipeline.exports.written import Written
from schemas.dataset import CachedDataset
from stages.student.batches.top_k_rows import TopKRow

# Numbers alone: its collator makes a tensor of every column.
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("attention_mask", pa.list_(pa.int8())),
        ("labels", pa.list_(pa.int32())),
        ("target_token_ids", pa.list_(pa.list_(pa.int32()))),
        ("target_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("target_mask", pa.list_(pa.list_(pa.int8()))),
    ]
)


def export(splits: Mapping[str, CachedDataset], folder: Path, k: int | None) -> Written:
    """Save rows for ``load_from_disk``; raises ConfigError where there is no top-k."""
    rows = top_k_rows(splits, k)
    batches = {split: record_batches(each, SCHEMA, _columns) for split, each in rows.items()}
    written = save_to_disk(folder, SCHEMA, batches)
    return Written(written, f"{lost_of(rows)}; the top is made to sum to one")


def _columns(rows: Sequence[TopKRow]) -> list[pa.Array]:
    ids, logprobs, masks = zip(*map(token_aligned, rows), strict=True)
    return [
        lists([row.input_ids_T for row in rows], pa.int32()),
        lists([np.ones(len(row.input_ids_T), np.int8) for row in rows], pa.int8()),
        lists([row.labels_T for row in rows], pa.int32()),
        lists(ids, pa.int32()),
        lists([_renormalised(*each) for each in zip(logprobs, masks, strict=True)], pa.float32()),
        lists(masks, pa.int8()),
    ]


def _renormalised(logprobs_TK: Array, mask_TK: Array) -> Array:
    total_T1 = np.logaddexp.reduce(logprobs_TK, axis=1, keepdims=True)
    return np.asarray(np.where(mask_TK == 1, logprobs_TK - total_T1, logprobs_TK))
