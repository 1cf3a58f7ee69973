"""Format ``parquet-sampled``: plain Parquet files of a sampled table, tokens with weights."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.exports.list_columns import lists, ragged_lists, record_batches
from pipeline.exports.parquet_files import write_parquet
from pipeline.exports.written import Written
from schemas.dataset import CachedDataset
from schemas.distribution import weighted_tokens
from schemas.errors import ConfigError
from stages.student.batches.signals import SAMPLED, encoding_of
from stages.student.batches.top_k_rows import TokenRow, require_signals, token_row

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("target_positions", pa.list_(pa.int32())),
        ("sampled_ids", pa.list_(pa.list_(pa.int32()))),
        ("sampled_weights", pa.list_(pa.list_(pa.float32()))),
    ]
)
# A row, the numbers of entries [P] of its positions, their ids and weights end to end.
Sampled = tuple[TokenRow, npt.NDArray[Any], npt.NDArray[np.int32], npt.NDArray[np.float32]]


def export(splits: Mapping[str, CachedDataset], folder: Path, k: int | None) -> Written:
    """Write ``FOLDER/SPLIT/part-*.parquet``; raises ConfigError for another encoding."""
    if k is not None:
        raise ConfigError(
            "--k is for a top-k: a sampled distribution is exported with all of its entries, "
            "which are unbiased together only; leave --k out"
        )
    for dataset in splits.values():
        require_signals(dataset)
        if (encoding := encoding_of(dataset)) not in SAMPLED:
            raise ConfigError(
                f"parquet-sampled is for the encoding threshold, {dataset.folders[-1]} has "
                f"{encoding}: export it by --to parquet"
            )
    rows = {
        split: write_parquet(
            folder / split, SCHEMA, record_batches(_rows(dataset), SCHEMA, _columns)
        )
        for split, dataset in splits.items()
    }
    return Written(rows, "nothing; the weights are unbiased estimates of probabilities, no top-k")


def _rows(dataset: CachedDataset) -> Iterator[Sampled]:
    for index in range(len(dataset)):
        row = dataset[index]
        ids_PK, weights_PK = weighted_tokens(row)
        num_positions, k = ids_PK.shape
        counts_P = np.full(num_positions, k)
        if "num_tail_P" in row:
            counts_P = row["num_head_P"].astype(np.int64) + row["num_tail_P"]
        is_kept_PK = np.arange(k) < counts_P[:, None]
        kept = ids_PK[is_kept_PK].astype(np.int32), weights_PK[is_kept_PK]
        yield TokenRow(**token_row(row)), counts_P, *kept


def _columns(rows: Sequence[Sampled]) -> list[pa.Array | list[str]]:
    tokens, counts, ids, weights = zip(*rows, strict=True)
    return [
        [row.sample_id for row in tokens],
        lists([row.input_ids_T for row in tokens], pa.int32()),
        lists([row.labels_T for row in tokens], pa.int32()),
        lists([row.targets_P.astype(np.int32) for row in tokens], pa.int32()),
        ragged_lists(counts, ids, pa.int32()),
        ragged_lists(counts, weights, pa.float32()),
    ]
