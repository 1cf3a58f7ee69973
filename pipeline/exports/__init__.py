"""Finished tables as other trainers read them, a format a file; ``FORMATS`` is the list of all."""

from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.exports import axolotl, datasets_folder, distillkit, parquet, parquet_sampled, trl_dpo
from pipeline.exports.written import Written
from schemas.dataset import CachedDataset

# From the data set of each split and a folder to be filled; K is None where none was asked for.
Format = Callable[[Mapping[str, CachedDataset], Path, int | None], Written]

FORMATS: dict[str, Format] = {
    "parquet": parquet.export,
    "parquet-sampled": parquet_sampled.export,
    "datasets": datasets_folder.export,
    "trl-dpo": trl_dpo.export,
    "axolotl": axolotl.export,
    "distillkit": distillkit.export,
}
