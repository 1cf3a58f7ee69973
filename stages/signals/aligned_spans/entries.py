"""A teacher's entries under another tokenizer's ids: those whose bytes are one token of both.

Dimensions: P = scored positions, K = entries of one, S = spans, E = entries of all spans.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.distribution import unpack_top_k, weighted_tokens
from schemas.tables.aligned_spans import AlignedEntries, AlignedSpans
from stages.models.checkpoints.token_bytes import ByteTokenizer

Array = npt.NDArray[Any]
NO_TOKEN = -1
LEAST = 2.0**-24  # a probability below it is none in float16


class Kept(NamedTuple):
    """A row's likeliest tokens and their probabilities [P, K]; 0 where a position has fewer."""

    ids_PK: Array
    probs_PK: Array


def same_tokens(teacher: ByteTokenizer, student: ByteTokenizer) -> Array:
    """Return for each id of the teacher the student's token of the same bytes, or ``NO_TOKEN``.

    The ends of a text are each other's.
    """
    id_of = {part: index for index, part in student.bytes_of.items()}
    same_V = np.full(1 + max(*teacher.bytes_of, *teacher.special), NO_TOKEN, np.int64)
    for index, part in teacher.bytes_of.items():
        same_V[index] = id_of.get(part, NO_TOKEN)
    if "eos" in teacher.named and "eos" in student.named:
        same_V[teacher.named["eos"]] = student.named["eos"]
    return same_V


def kept_of(columns: Mapping[str, Array]) -> Kept:
    """Return the entries of a row whose probabilities are known: no sampled ones."""
    if "logprobs_PK" in columns:
        probs_PK, _ = unpack_top_k(columns["logprobs_PK"], columns["rest_logprobs_P"])
        return Kept(columns["token_ids_PK"].astype(np.int64), probs_PK)
    ids_PK, weights_PK = weighted_tokens(columns)
    in_head_PK = np.arange(ids_PK.shape[1]) < columns["num_head_P"][:, None]
    return Kept(ids_PK.astype(np.int64), np.where(in_head_PK, weights_PK, 0.0))


def with_entries(row: AlignedSpans, kept: Kept, places_S: Array, same_V: Array) -> AlignedEntries:
    """Add entries to a row; ``places_S`` are its spans' first positions, -1 for one without any.

    Tokens of the teacher's whose bytes are the same count together.
    """
    ids, logprobs, counts = [], [], []
    for place in places_S.tolist():
        ids_K, probs_K = kept.ids_PK[place], kept.probs_PK[place]
        in_reach_K = (probs_K > LEAST) & (ids_K < len(same_V)) & (place >= 0)
        others, at = np.unique(same_V[ids_K[in_reach_K]], return_inverse=True)
        sums = np.bincount(at, probs_K[in_reach_K], len(others))
        is_token = others != NO_TOKEN
        ids.append(others[is_token])
        logprobs.append(np.log(sums[is_token]))
        counts.append(int(is_token.sum()))
    columns = {name: getattr(row, name) for name in AlignedSpans.__dataclass_fields__}
    return AlignedEntries(
        **columns,
        num_entries_S=np.array(counts, np.uint8),
        entry_ids_E=np.concatenate(ids),
        entry_logprobs_E=np.concatenate(logprobs).astype(np.float16),
    )
