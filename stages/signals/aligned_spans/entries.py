"""A teacher's entries under another tokenizer's ids: the token that the bytes of each begin with.

What a teacher says in one token, `` Dogs``, a student may say in two, `` Dog`` and ``s``: the
probability of the one is that of the first of the two, where the text stands still at the same
byte. Were tokens of both alone kept, the student would be told that `` Dog`` is as rare as in the
teacher's tokens, where it is only spelled otherwise (arXiv 2605.21699 sees students spoilt so).

A teacher's token is taken as if it stood alone: the student's tokens of its text could also reach
over its end.

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


def first_tokens(teacher: ByteTokenizer, student: ByteTokenizer) -> Array:
    """Return for each id of the teacher the student's token that its bytes begin with.

    That is not the token of the same bytes where the tokenizer never makes it (digits of a number
    kept apart); it is for bytes that are no text. ``NO_TOKEN`` where none is known. The ends of a
    text are each other's.
    """
    id_of = {part: index for index, part in student.bytes_of.items()}
    first_V = np.full(1 + max(*teacher.bytes_of, *teacher.special), NO_TOKEN, np.int64)
    for index, part in teacher.bytes_of.items():
        found = student.begin_of(part)
        first_V[index] = id_of.get(part, NO_TOKEN) if found is None else found
    if "eos" in teacher.named and "eos" in student.named:
        first_V[teacher.named["eos"]] = student.named["eos"]
    return first_V


def kept_of(columns: Mapping[str, Array]) -> Kept:
    """Return the entries of a row whose probabilities are known: no sampled ones."""
    if "logprobs_PK" in columns:
        probs_PK, _ = unpack_top_k(columns["logprobs_PK"], columns["rest_logprobs_P"])
        return Kept(columns["token_ids_PK"].astype(np.int64), probs_PK)
    ids_PK, weights_PK = weighted_tokens(columns)
    in_head_PK = np.arange(ids_PK.shape[1]) < columns["num_head_P"][:, None]
    return Kept(ids_PK.astype(np.int64), np.where(in_head_PK, weights_PK, 0.0))


def with_entries(row: AlignedSpans, kept: Kept, places_S: Array, first_V: Array) -> AlignedEntries:
    """Add entries to a row; ``places_S`` are its spans' first positions, -1 for one without any.

    Tokens of the teacher's that begin with the same token of the student's count together.
    """
    ids, logprobs, counts = [], [], []
    for place in places_S.tolist():
        ids_K, probs_K = kept.ids_PK[place], kept.probs_PK[place]
        in_reach_K = (probs_K > LEAST) & (ids_K < len(first_V)) & (place >= 0)
        others, at = np.unique(first_V[ids_K[in_reach_K]], return_inverse=True)
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
