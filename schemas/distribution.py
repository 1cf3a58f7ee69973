"""Sparse encodings of a token distribution: quantise, unpack and take expectations (numpy).

``threshold`` keeps exactly K entries of a distribution p over V tokens. With tau the solution of
``sum_v min(1, p_v / tau) = K``, the *head* is every token with ``p >= tau``; the K - h others are a
systematic sample of the tail with inclusion probability ``p / tau``, each of weight tau. The
weights are an unbiased estimate of p and sum to one. This is threshold (priority) sampling with
fixed size, as in Duffield, Lund and Thorup (2007, doi:10.1145/1314690.1314696), in place of the
sampling with replacement of RS-KD (arXiv 2503.16870).

A tail entry needs no stored value: its weight is what the head leaves over, divided by K - h. The
head is coded as a broken stick: entry i takes the fraction ``f_i = p_i / (1 - p_1 - .. - p_{i-1})``
of what is left, one of 64 levels ``f = sin^2(pi c / 126)`` (fine near 0 and near 1), rounded up or
down at random with the odds that make ``E[f] = f``. As the roundings are independent, every decoded
weight is still unbiased and no sum can pass one. On 1,500 real positions rounding added 3 % to the
error of a student's cross-entropy at K = 16 (256 levels: 0.3 %), and took 1 byte a token less.

``threshold_tau`` lets the number of entries follow the position: tau is one constant of the table,
and a position has the fewest entries whose own threshold is at most that, never more than a stated
number. The variance of a student's gradient is about tau times the mass of the tail, so for a mean
number of entries the sum over positions is least where tau is equal everywhere; a sure position
takes one or two entries, a flat one up to 1 / tau. Entries whose decoded weight is exactly 0 (all
after a fraction that was rounded to 1) are not kept: nothing else changes. The tail is a set, and
is stored by rising id as gaps, low bytes and the rest apart: on 8,176 real positions a sampled id
took 1.53 bytes after zstd in the place of 1.69 (November 2026).

``top_k`` keeps the K largest log-probabilities and the log of the mass of the rest.

Dimensions: P = scored positions, K = kept entries (the most of a position), H = head entries of all
positions together, E = tail entries of all positions (of ``threshold``: its head entries).
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]
AnyArray = npt.NDArray[Any]

STICK_LEVELS = np.sin(np.arange(64) * (math.pi / 126)) ** 2  # float64 [64], 0 to 1
_STEPS = np.diff(STICK_LEVELS)
# The level at or below the start of each cell of [0, 1]; at most one more lies inside it. To look
# it up takes a quarter of a binary search's time.
_CELLS = 2048
_CELL_LEVELS = np.searchsorted(STICK_LEVELS, np.arange(_CELLS + 1) / _CELLS, side="right") - 1
MAX_MASS_ERROR = 0.02  # of top_k: float16 log-probs alone move the sum of its buckets by under 0.01
_DROPPED_BITS = 4  # of the ten that float16 stores of a mantissa


def row_key(seed: int, sample_id: str) -> int:
    """Return the key of a row's draws: equal for equal seeds, whatever is drawn beside the row."""
    digest = hashlib.blake2b(f"{seed}:{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(key: int, num_positions: int, per_position: int) -> F32Array:
    """Return [P, n] numbers in [0, 1) that depend on ``key`` and their place alone.

    A counter hashed by splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195): the same on
    every machine and in every batch, which no library's generator promises across versions.
    """
    counter = np.arange(num_positions * per_position, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    top_24_bits = (x >> np.uint64(40)).astype(np.float32)
    return (top_24_bits / np.float32(1 << 24)).reshape(num_positions, per_position)


def quantise_sticks(fractions_PK: AnyArray, uniforms_PK: AnyArray) -> U8Array:
    """Round fractions [...] in [0, 1] to stick levels, up or down at random without bias."""
    clipped = np.clip(np.asarray(fractions_PK, np.float64), 0.0, 1.0)
    low = _CELL_LEVELS[(clipped * _CELLS).astype(np.intp)]
    low += clipped >= STICK_LEVELS[np.minimum(low + 1, len(STICK_LEVELS) - 1)]
    low = np.minimum(low, len(STICK_LEVELS) - 2)
    up = np.asarray(uniforms_PK) < (clipped - STICK_LEVELS[low]) / _STEPS[low]
    return np.asarray(low + up, np.uint8)


def round_mantissa(values: AnyArray) -> npt.NDArray[np.float16]:
    """Round to float16 values of 7 significant bits, which compress to two thirds of the bytes.

    To nearest, ties to even: an error of at most 1/128 of the value and of mean zero (on 34,680
    real positions the mean moved by less than 1e-4 nats).
    """
    bits = np.ascontiguousarray(values, np.float16).view(np.uint16).astype(np.int64)
    to_nearest = (1 << (_DROPPED_BITS - 1)) - 1 + ((bits >> _DROPPED_BITS) & 1)
    kept = (bits + to_nearest) >> _DROPPED_BITS << _DROPPED_BITS
    return kept.astype(np.uint16).view(np.float16)


def unpack_threshold(
    token_ids_PK: AnyArray, num_head_P: U8Array, head_codes_E: U8Array
) -> F32Array:
    """Return the weights [P, K] (float32, each row sums to one) of a ``threshold`` row."""
    num_positions, k = token_ids_PK.shape
    return _weights(np.full(num_positions, k), k, num_head_P, head_codes_E)


def unpack_threshold_tau(columns: Mapping[str, AnyArray]) -> tuple[AnyArray, F32Array]:
    """Return ids (int64) and weights [P, K] of a ``threshold_tau`` row, K the most of a position.

    A position with fewer has its own first id in the other places, with weight 0.
    """
    num_head_P, num_tail_P = (
        np.asarray(columns[name], np.int64) for name in ("num_head_P", "num_tail_P")
    )
    num_entries_P = num_head_P + num_tail_P
    k = int(num_entries_P.max(initial=1))
    in_head_PK = np.arange(k) < num_head_P[:, None]
    in_use_PK = np.arange(k) < num_entries_P[:, None]
    ids_PK = np.zeros(in_use_PK.shape, np.int64)
    ids_PK[in_head_PK] = columns["head_ids_H"]
    ids_PK[in_use_PK & ~in_head_PK] = tail_ids(columns)
    ids_PK = np.where(in_use_PK, ids_PK, ids_PK[:, :1])
    return ids_PK, _weights(num_entries_P, k, columns["num_head_P"], columns["head_codes_H"])


def split_gaps(ids_PK: AnyArray, is_kept_PK: AnyArray) -> tuple[U8Array, AnyArray]:
    """Return kept ids, which rise at each position, as gaps: their low bytes [E] and the rest [E].

    A position's first gap is its first kept id.
    """
    first_PK = is_kept_PK & (np.cumsum(is_kept_PK, axis=1) == 1)
    ids_E, is_first_E = ids_PK[is_kept_PK].astype(np.int64), first_PK[is_kept_PK]
    gaps_E = np.where(is_first_E, ids_E, np.diff(ids_E, prepend=0))
    if (gaps_E < 0).any():
        raise ValueError("ids have to rise at each position")
    return (gaps_E & 255).astype(np.uint8), gaps_E >> 8


def tail_ids(columns: Mapping[str, AnyArray]) -> AnyArray:
    """Return the tail ids [E] (int64) of a ``threshold_tau`` row, all positions end to end."""
    gaps = columns["tail_gaps_low_E"], columns["tail_gaps_high_E"]
    return ids_of_gaps(columns["num_tail_P"], *gaps)


def ids_of_gaps(counts_P: AnyArray, low_E: AnyArray, high_E: AnyArray) -> AnyArray:
    """Return the ids [E] (int64) that ``split_gaps`` parted, ``counts_P`` of each position."""
    counts_P = np.asarray(counts_P, np.int64)
    gaps_E = np.asarray(high_E, np.int64) * 256 + low_E
    running_E = np.cumsum(np.concatenate([[0], gaps_E]))
    starts_P = np.cumsum(counts_P) - counts_P
    return np.asarray(running_E[1:] - np.repeat(running_E[starts_P], counts_P))


def weighted_tokens(row: Mapping[str, Any]) -> tuple[AnyArray, F32Array]:
    """Return token ids and weights [P, K] of a row in either ``threshold`` layout."""
    if "token_ids_PK" in row:
        ids_PK = row["token_ids_PK"]
        return ids_PK, unpack_threshold(ids_PK, row["num_head_P"], row["head_codes_E"])
    return unpack_threshold_tau(row)


def _weights(
    num_entries_P: AnyArray, k: int, num_head_P: U8Array, head_codes_H: U8Array
) -> F32Array:
    in_head_PK = np.arange(k) < num_head_P[:, None]
    if in_head_PK.sum() != len(head_codes_H):
        raise ValueError(f"{len(head_codes_H)} head codes for {int(in_head_PK.sum())} head entries")
    fractions_PK = np.zeros(in_head_PK.shape)
    fractions_PK[in_head_PK] = STICK_LEVELS[head_codes_H]
    left_PK = np.cumprod(1.0 - fractions_PK, axis=1)
    before_PK = np.concatenate([np.ones((len(left_PK), 1)), left_PK[:, :-1]], axis=1)
    num_tail_P = np.maximum(num_entries_P - num_head_P.astype(np.int64), 1)
    tail_PK = np.where(np.arange(k) < num_entries_P[:, None], left_PK[:, -1:], 0.0)
    tail_PK /= num_tail_P[:, None]
    return np.where(in_head_PK, fractions_PK * before_PK, tail_PK).astype(np.float32)


def unpack_top_k(logprobs_PK: AnyArray, rest_logprobs_P: AnyArray) -> tuple[F32Array, F32Array]:
    """Return the kept probabilities [P, K] and the mass of the rest [P], float32."""
    probs_PK = np.exp(logprobs_PK.astype(np.float32))
    return probs_PK, np.exp(rest_logprobs_P.astype(np.float32))


def expectation(token_ids_PK: AnyArray, weights_PK: AnyArray, values_PV: AnyArray) -> AnyArray:
    """Return sum_i weight_i * values[token_i] for each position, without a dense [P, V] teacher."""
    picked_PK = np.take_along_axis(values_PV, token_ids_PK.astype(np.int64), axis=1)
    return np.asarray((weights_PK * picked_PK).sum(axis=1))
