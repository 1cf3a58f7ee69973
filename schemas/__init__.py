"""What a row is, and how rows lie on a disk or in a store: pyarrow and numpy, nothing else."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advantage_values import advantage_values
    from .dataset import CachedDataset, open_dataset
    from .distribution import unpack_threshold, unpack_top_k, weighted_tokens
    from .rounded_states import hidden_states
    from .sample_id import sample_id_of
    from .scored_spans import scored_targets, span_targets
    from .storage.manifest import Manifest, read_manifest
    from .storage.records import ShardRecord
    from .tables.candidate_scores import CANDIDATE_SCORES, CandidateScores
    from .tables.documents import DOCUMENTS, Document
    from .tables.episodes import EPISODES, Episode, split_candidates, subset_input_ids
    from .tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
    from .tables.prompted.advantages import (
        SUPPORTS,
        ExactAdvantages,
        ReleasedAdvantages,
        TauAdvantages,
        ThresholdAdvantages,
        UnionAdvantages,
    )
    from .tables.prompted.response_logprobs import RESPONSE_LOGPROBS, ResponseLogprobs
    from .tables.prompted.responses import RESPONSES, Responses
    from .tables.subset_preferences import SUBSET_PREFERENCES, SubsetPreferences, split_subsets
    from .tables.teacher_logits import (
        ENCODINGS,
        ExactLogits,
        RoundedLogits,
        TauLogits,
        ThresholdLogits,
        TopKLogits,
    )

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
    "RoundedLogits",
    "ShardRecord",
    "SubsetPreferences",
    "TauAdvantages",
    "TauLogits",
    "ThresholdAdvantages",
    "ThresholdLogits",
    "TopKLogits",
    "UnionAdvantages",
    "advantage_values",
    "hidden_states",
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
    "weighted_tokens",
]

# Loaded when they are first asked for: a command that only prints its help reads no table.
_MODULES = {
    "advantage_values": ("advantage_values",),
    "dataset": ("CachedDataset", "open_dataset"),
    "distribution": ("unpack_threshold", "unpack_top_k", "weighted_tokens"),
    "rounded_states": ("hidden_states",),
    "sample_id": ("sample_id_of",),
    "scored_spans": ("scored_targets", "span_targets"),
    "storage.manifest": ("Manifest", "read_manifest"),
    "storage.records": ("ShardRecord",),
    "tables.prompted.advantages": (
        "SUPPORTS",
        "ExactAdvantages",
        "ReleasedAdvantages",
        "TauAdvantages",
        "ThresholdAdvantages",
        "UnionAdvantages",
    ),
    "tables.candidate_scores": ("CANDIDATE_SCORES", "CandidateScores"),
    "tables.documents": ("DOCUMENTS", "Document"),
    "tables.episodes": ("EPISODES", "Episode", "split_candidates", "subset_input_ids"),
    "tables.preference_pairs": ("PREFERENCE_PAIRS", "PreferencePair"),
    "tables.prompted.response_logprobs": ("RESPONSE_LOGPROBS", "ResponseLogprobs"),
    "tables.prompted.responses": ("RESPONSES", "Responses"),
    "tables.subset_preferences": ("SUBSET_PREFERENCES", "SubsetPreferences", "split_subsets"),
    "tables.teacher_logits": (
        "ENCODINGS",
        "ExactLogits",
        "RoundedLogits",
        "TauLogits",
        "ThresholdLogits",
        "TopKLogits",
    ),
}


def __getattr__(name: str) -> Any:
    """Return a public name from its module."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
