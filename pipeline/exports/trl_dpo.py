"""Format ``trl-dpo``: preference pairs with their reference's log-probs, for TRL's DPOTrainer.

Columns are those that its collator reads (TRL 1.16, ``DataCollatorForPreference``): ids of prompt
and responses, and the sum of log-probs of each response under the reference.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.exports.datasets_folder import save_to_disk
from pipeline.exports.list_columns import lists, record_batches
from pipeline.exports.written import Written
from schemas.dataset import CachedDataset
from schemas.errors import ConfigError
from stages.student.batches.pairs import reference_logprobs

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("ref_chosen_logps", pa.float32()),
        ("ref_rejected_logps", pa.float32()),
    ]
)
TABLES = ["preference_pairs", "response_logprobs"]


def export(splits: Mapping[str, CachedDataset], folder: Path, k: int | None) -> Written:
    """Save pairs for ``datasets.load_from_disk``; raises ConfigError for other tables."""
    if k is not None:
        raise ConfigError("--k is for distributions, trl-dpo holds two log-probs a pair: leave it")
    for dataset in splits.values():
        tables = [manifest.table for manifest in dataset.manifests]
        if sorted(tables) != TABLES:
            raise ConfigError(
                f"--data are the tables {', '.join(tables)}, expected {' and '.join(TABLES)}, "
                f"the latter made of these pairs by the reference"
            )
    batches = {
        split: record_batches(_rows(dataset), SCHEMA, _columns) for split, dataset in splits.items()
    }
    return Written(save_to_disk(folder, SCHEMA, batches), "nothing")


def _rows(dataset: CachedDataset) -> Iterator[dict[str, Any]]:
    for index in range(len(dataset)):
        yield dataset[index]


def _columns(rows: Sequence[dict[str, Any]]) -> list[pa.Array | list[Any]]:
    names = ("prompt_ids_T", "chosen_ids_C", "rejected_ids_R")
    chosen, rejected = zip(*reference_logprobs(rows).tolist(), strict=True)
    return [
        [row["sample_id"] for row in rows],
        *(lists([row[name] for row in rows], pa.int32()) for name in names),
        list(chosen),
        list(rejected),
    ]
