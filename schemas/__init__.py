"""What a row is, and how rows lie on a disk or in a store: pyarrow and numpy, nothing else."""

from .dataset import CachedDataset, open_dataset
from .distribution import unpack_threshold, unpack_top_k
from .sample_id import sample_id_of
from .scored_spans import scored_targets, span_targets
from .storage.manifest import Manifest, read_manifest
from .storage.records import ShardRecord
from .tables.advantages import (
    SUPPORTS,
    ExactAdvantages,
    ReleasedAdvantages,
    ThresholdAdvantages,
    UnionAdvantages,
)
from .tables.candidate_scores import CANDIDATE_SCORES, CandidateScores
from .tables.documents import DOCUMENTS, Document
from .tables.episodes import EPISODES, Episode, split_candidates, subset_input_ids
from .tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from .tables.response_logprobs import RESPONSE_LOGPROBS, ResponseLogprobs
from .tables.responses import RESPONSES, Responses
from .tables.subset_preferences import SUBSET_PREFERENCES, SubsetPreferences, split_subsets
from .tables.teacher_logits import ENCODINGS, ExactLogits, ThresholdLogits, TopKLogits

__all__ = [
    "CANDIDATE_SCORES",
    "DOCUMENTS",
    "ENCODINGS",
    "EPISODES",
    "PREFERENCE_PAIRS",
    "RESPONSES",
    "RESPONSE_LOGPROBS",
    "SUBSET_PREFERENCES",
    "SUPPORTS",
    "CachedDataset",
    "CandidateScores",
    "Document",
    "Episode",
    "ExactAdvantages",
    "ExactLogits",
    "Manifest",
    "PreferencePair",
    "ReleasedAdvantages",
    "ResponseLogprobs",
    "Responses",
    "ShardRecord",
    "SubsetPreferences",
    "ThresholdAdvantages",
    "ThresholdLogits",
    "TopKLogits",
    "UnionAdvantages",
    "open_dataset",
    "read_manifest",
    "sample_id_of",
    "scored_targets",
    "span_targets",
    "split_candidates",
    "split_subsets",
    "subset_input_ids",
    "unpack_threshold",
    "unpack_top_k",
]
