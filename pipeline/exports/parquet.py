"""Format ``parquet``: plain Parquet files of each row's tokens and their K likeliest tokens."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.exports.parquet_files import write_parquet
from pipeline.exports.top_k_columns import SCHEMA, lost_of, top_k_batches, top_k_rows
from pipeline.exports.written import Written
from schemas.dataset import CachedDataset


def export(splits: Mapping[str, CachedDataset], folder: Path, k: int | None) -> Written:
    """Write ``FOLDER/SPLIT/part-*.parquet``; raises ConfigError where there is no top-k."""
    rows = top_k_rows(splits, k)
    written = {
        split: write_parquet(folder / split, SCHEMA, top_k_batches(each))
        for split, each in rows.items()
    }
    return Written(written, lost_of(rows))
