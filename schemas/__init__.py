"""What a row is: tables, encodings, shards, manifests. Needs pyarrow and numpy, nothing else."""

from .advantages import (
    SUPPORTS,
    ExactAdvantages,
    ReleasedAdvantages,
    ThresholdAdvantages,
    UnionAdvantages,
)
from .candidate_scores import CANDIDATE_SCORES, CandidateScores
from .dataset import CachedDataset, open_dataset
from .distribution import unpack_threshold, unpack_top_k
from .documents import DOCUMENTS, Document
from .episodes import EPISODES, Episode, split_candidates, subset_input_ids
from .manifest import Manifest, ShardRecord, read_manifest
from .preference_pairs import PREFERENCE_PAIRS, PreferencePair
from .response_logprobs import RESPONSE_LOGPROBS, ResponseLogprobs
from .responses import RESPONSES, Responses
from .sample_id import sample_id_of
from .subset_preferences import SUBSET_PREFERENCES, SubsetPreferences, split_subsets
from .teacher_logits import ENCODINGS, ExactLogits, ThresholdLogits, TopKLogits

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
    "split_candidates",
    "split_subsets",
    "subset_input_ids",
    "unpack_threshold",
    "unpack_top_k",
]
