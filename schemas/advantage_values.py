"""Advantages as rows keep them, and as an objective reads them: token ids with values (numpy).

What an objective needs of a sparse support is ``sum_a pi(a) A(a)``, as ``rest`` and, of each kept
token, one value: ``rest + sum_k pi(a_k) value_k``.

``threshold_tau`` keeps those values themselves. With c a constant of the position (``rest``), a
token of difference ``d = A - c`` is kept with a probability i, and its value is ``d / i``. Values
are ``sign 2^(level / 3 - 18)``, level 0 to 127, one byte. Whoever draws tokens first gives each a
level that is a whole power of two, and then the probability ``i = min(1, |d| / 2^n)``: what is
drawn with less than certainty has the value ``sign 2^n`` exactly, and no number of it is rounded.
Of a token that is sure the size is rounded up or down at random with the odds that make
``E[value] = d``. So every value is unbiased, and as 42 octaves take 7 bits there is no table-wide
scale to know.

Dimensions: P = positions, K = kept tokens (of ragged supports: the most of a position), E = kept
tokens of all positions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .distribution import ids_of_gaps

AnyArray = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]

_PER_OCTAVE = 3
FIRST_OCTAVE, LAST_OCTAVE = -18, 24  # of sizes in nats: levels 0 and 126
_LEVELS = np.arange(128)
LEVEL_SIZES = np.ldexp(np.exp2(_LEVELS % 3 / _PER_OCTAVE), _LEVELS // _PER_OCTAVE + FIRST_OCTAVE)
_STEPS = np.diff(LEVEL_SIZES)


def value_codes(values: AnyArray, uniforms: AnyArray) -> npt.NDArray[np.uint8]:
    """Return a byte for each value in nats: twice its level, and 1 more where it is negative.

    A size between two levels is rounded up or down at random without bias; one below the first
    level or above the last raises ValueError.
    """
    sizes = np.abs(np.asarray(values, np.float64))
    if sizes.size and not LEVEL_SIZES[0] <= sizes.min() <= sizes.max() <= LEVEL_SIZES[-1]:
        raise ValueError(f"values of {sizes.min():.3g} to {sizes.max():.3g} nats have no level")
    low = np.minimum(np.searchsorted(LEVEL_SIZES, sizes, side="right") - 1, len(_STEPS) - 1)
    levels = low + (np.asarray(uniforms) < (sizes - LEVEL_SIZES[low]) / _STEPS[low])
    return np.asarray(2 * levels + (np.asarray(values) < 0), np.uint8)


def values_of(codes: AnyArray) -> F32Array:
    """Return the values, in nats, of ``value_codes``."""
    sizes = LEVEL_SIZES[np.asarray(codes) >> 1]
    return np.where(np.asarray(codes) & 1, -sizes, sizes).astype(np.float32)


def advantage_values(row: Mapping[str, Any]) -> tuple[AnyArray, F32Array, F32Array]:
    """Return ids (int64) and values [P, K] and the rest [P] of a row of any sparse support.

    ``rest + sum_k pi(a_k) value_k`` is the expected advantage: of ``threshold`` and
    ``threshold_tau`` an unbiased estimate. Where a position has fewer than K tokens the others are
    id 0 with value 0. Advantages of ``as_released`` are not clipped. Raises ValueError for
    ``exact``, which keeps no tokens.
    """
    if "value_codes_E" in row:
        counts_P = np.asarray(row["num_entries_P"], np.int64)
        ids_E = ids_of_gaps(counts_P, row["id_gaps_low_E"], row["id_gaps_high_E"])
        ids_PK, values_PK = _side_by_side(counts_P, ids_E, values_of(row["value_codes_E"]))
        return ids_PK, values_PK, np.asarray(row["rest_advantages_P"], np.float32)
    if "num_entries_P" in row:
        # As probabilities sum to one, ``sum_k pi_k A_k + pi_rest A_rest`` is ``A_rest`` and
        # ``sum_k pi_k (A_k - A_rest)``.
        counts_P = np.asarray(row["num_entries_P"], np.int64)
        rest_P = np.asarray(row["rest_advantages_P"], np.float32)
        values_E = np.asarray(row["advantages_E"], np.float32) - np.repeat(rest_P, counts_P)
        return *_side_by_side(counts_P, row["token_ids_E"], values_E), rest_P
    if "token_ids_PK" not in row:
        raise ValueError("support exact keeps hidden states, no tokens")
    ids_PK = np.asarray(row["token_ids_PK"], np.int64)
    values_PK = np.asarray(row["advantages_PK"], np.float32)
    if "log_inclusions_PK" in row:
        values_PK = values_PK * np.exp(-np.asarray(row["log_inclusions_PK"], np.float32))
    return ids_PK, values_PK, np.zeros(len(ids_PK), np.float32)


def _side_by_side(
    counts_P: AnyArray, ids_E: AnyArray, values_E: AnyArray
) -> tuple[AnyArray, F32Array]:
    """Return [P, K] of entries that lie end to end, padded with zeros."""
    filled_PK = np.arange(int(counts_P.max(initial=1))) < counts_P[:, None]
    ids_PK = np.zeros(filled_PK.shape, np.int64)
    values_PK = np.zeros(filled_PK.shape, np.float32)
    ids_PK[filled_PK], values_PK[filled_PK] = ids_E, values_E
    return ids_PK, values_PK
