"""What a row is: tables, encodings, shards, manifests. Needs pyarrow and numpy, nothing else."""

from .dataset import CachedDataset, open_dataset
from .distribution import unpack_threshold, unpack_top_k
from .documents import DOCUMENTS, Document
from .manifest import Manifest, ShardRecord, read_manifest
from .sample_id import sample_id_of
from .teacher_logits import ENCODINGS, ExactLogits, ThresholdLogits, TopKLogits

__all__ = [
    "DOCUMENTS",
    "ENCODINGS",
    "CachedDataset",
    "Document",
    "ExactLogits",
    "Manifest",
    "ShardRecord",
    "ThresholdLogits",
    "TopKLogits",
    "open_dataset",
    "read_manifest",
    "sample_id_of",
    "unpack_threshold",
    "unpack_top_k",
]
