"""Format ``datasets``: a folder that ``datasets.load_from_disk`` opens, as of ``parquet``."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from pipeline.exports.top_k_columns import SCHEMA, lost_of, top_k_batches, top_k_rows
from pipeline.exports.written import Written
from schemas.dataset import CachedDataset


def export(splits: Mapping[str, CachedDataset], folder: Path, k: int | None) -> Written:
    """Save a ``DatasetDict`` with each split; raises ConfigError where there is no top-k."""
    rows = top_k_rows(splits, k)
    batches = {split: top_k_batches(each) for split, each in rows.items()}
    written = save_to_disk(folder, SCHEMA, batches)
    return Written(written, lost_of(rows))


def save_to_disk(
    folder: Path, schema: pa.Schema, splits: Mapping[str, Iterable[pa.RecordBatch]]
) -> dict[str, int]:
    """Save record batches as ``datasets`` does; return the number of rows of each split.

    They lie in Arrow files first, which ``datasets`` maps, so no split is ever held in memory.
    """
    import datasets  # an extra, and seconds to load

    datasets.disable_progress_bars()
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    opened = datasets.DatasetDict()
    for split, batches in splits.items():
        file = scratch / f"{split}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            for batch in batches:
                stream.write_batch(batch)
        opened[split] = datasets.Dataset.from_file(str(file))
    opened.save_to_disk(str(folder))
    shutil.rmtree(scratch)
    return {split: len(rows) for split, rows in opened.items()}
