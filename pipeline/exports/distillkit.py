"""Format ``distillkit``: rows with the raw top-k columns that DistillKit takes as they are.

Of the forms that its reader knows (1.0, ``compression/compressor.py``) this is the one that is not
compressed: ``token_ids`` and ``top_values``. It compares entry t with the student's logits at t and
counts the entries where ``labels`` has a token, not shifted; so labels are where entries are, and
the last token, at which nothing is predicted, is left out.
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
from stages.student.batches.signals import IGNORED
from stages.student.batches.top_k_rows import TopKRow

# Numbers alone: its collator makes a tensor of every column.
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.list_(pa.int32()))),
        ("top_values", pa.list_(pa.list_(pa.float32()))),
    ]
)


def export(splits: Mapping[str, CachedDataset], folder: Path, k: int | None) -> Written:
    """Save rows for ``load_from_disk``; raises ConfigError where there is no top-k."""
    rows = top_k_rows(splits, k)
    batches = {split: record_batches(each, SCHEMA, _columns) for split, each in rows.items()}
    return Written(save_to_disk(folder, SCHEMA, batches), lost_of(rows))


def _columns(rows: Sequence[TopKRow]) -> list[pa.Array]:
    ids, logprobs, _ = zip(*map(token_aligned, rows), strict=True)
    return [
        lists([row.input_ids_T[:-1] for row in rows], pa.int32()),
        lists([_labels(row)[:-1] for row in rows], pa.int32()),
        lists([ids_TK[:-1] for ids_TK in ids], pa.int32()),
        lists([logprobs_TK[:-1] for logprobs_TK in logprobs], pa.float32()),
    ]


def _labels(row: TopKRow) -> Array:
    labels_T = np.full(len(row.input_ids_T), IGNORED, np.int32)
    labels_T[row.targets_P - 1] = row.input_ids_T[row.targets_P - 1]
    return labels_T
