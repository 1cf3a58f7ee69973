"""The columns that plain Parquet and ``datasets`` have of a distribution's K likeliest tokens."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from pipeline.exports.list_columns import lists, record_batches
from schemas.dataset import CachedDataset
from stages.student.batches.top_k_rows import TopKRow, TopKRows

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("target_positions", pa.list_(pa.int32())),
        ("top_k_ids", pa.list_(pa.list_(pa.int32()))),
        ("top_k_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("rest_logprobs", pa.list_(pa.float32())),
    ]
)


def top_k_rows(splits: Mapping[str, CachedDataset], k: int | None) -> dict[str, TopKRows]:
    """Return the decoded rows of each split; raises ConfigError where there is no top-k."""
    return {split: TopKRows(dataset, k) for split, dataset in splits.items()}


def top_k_batches(rows: TopKRows) -> Iterator[pa.RecordBatch]:
    """Return record batches of ``SCHEMA``."""
    return record_batches(rows, SCHEMA, _columns)


def lost_of(rows: Mapping[str, TopKRows]) -> str:
    """Say which mass is outside the K tokens, once rows have been read."""
    positions = [each.num_positions for each in rows.values()]
    means = [each.mean_rest for each in rows.values()]
    mean = np.average(means, weights=positions) if any(positions) else 0.0
    k = max(each.k for each in rows.values())
    if any(each.is_renormalised for each in rows.values()):
        return (
            "the mass outside the kept tokens, which was dropped before these rows were imported: "
            "log-probs are not the teacher's own, they sum to one over what was kept"
        )
    return (
        f"which tokens share the mass outside the top {k}, {mean:.2%} of a distribution on average"
    )


def _columns(rows: Sequence[TopKRow]) -> list[pa.Array | list[str]]:
    return [
        [row.sample_id for row in rows],
        lists([row.input_ids_T for row in rows], pa.int32()),
        lists([row.labels_T for row in rows], pa.int32()),
        lists([row.targets_P.astype(np.int32) for row in rows], pa.int32()),
        lists([row.token_ids_PK for row in rows], pa.int32()),
        lists([row.logprobs_PK for row in rows], pa.float32()),
        lists([row.rest_logprobs_P for row in rows], pa.float32()),
    ]
