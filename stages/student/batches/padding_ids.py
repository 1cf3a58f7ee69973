"""Cached entries on ids that no token uses, which only pad a teacher's matrix: they are dropped.

What is left is made whole; ``stages.student.losses.kl`` says what is then trained on. Dropped
entries stay in their arrays, behind the others: with weight 0 and the id of the first one.

Dimensions: N = positions, K = kept entries.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Columns = dict[str, Array]


def drop_from_threshold(columns: Columns, num_token_ids: int | None) -> Columns:
    """Return decoded columns without ids from ``num_token_ids`` on, and ``dropped_N``.

    ``untaught_N`` is there where some position has nothing left.
    """
    ids_NK, weights_NK = columns["token_ids_NK"], columns["weights_NK"]
    if num_token_ids is None or ids_NK.max(initial=0) < num_token_ids:
        return columns | {"dropped_N": np.zeros(len(ids_NK), np.float32)}
    is_head_NK = np.arange(ids_NK.shape[1]) < columns["num_head_N"][:, None]
    is_token_NK = ids_NK < num_token_ids
    wide_NK = weights_NK.astype(np.float64)
    gone_NK = np.where(is_token_NK, 0.0, wide_NK)
    mass_N = (wide_NK - gone_NK).sum(axis=1)
    taught_N = mass_N > 0
    divisor_N = np.where(taught_N, mass_N, 1.0)
    log_NK = np.log(gone_NK, where=gone_NK > 0, out=np.zeros_like(gone_NK))
    entropies_N = (columns["entropies_N"] + (gone_NK * log_NK).sum(axis=1)) / divisor_N
    entropies_N += np.log(divisor_N)
    kept = {
        "token_ids_NK": ids_NK,
        "weights_NK": ((wide_NK - gone_NK) / divisor_N[:, None]).astype(np.float32),
    }
    return {
        **_behind(kept, is_token_NK),
        "num_head_N": (is_head_NK & is_token_NK).sum(axis=1).astype(np.uint8),
        "entropies_N": np.where(taught_N, entropies_N, 0.0).astype(np.float32),
        **_tally(gone_NK.sum(axis=1), taught_N),
    }


def drop_from_top_k(columns: Columns, num_token_ids: int | None) -> Columns:
    """Return the same of K probabilities and a rest, which together are one at each position.

    Where every token is among the kept, the rest was padding too.
    """
    ids_NK, probs_NK, rest_N = (columns[n] for n in ("token_ids_NK", "probs_NK", "rest_N"))
    if num_token_ids is None or ids_NK.max(initial=0) < num_token_ids:
        return columns | {"dropped_N": np.zeros(len(ids_NK), np.float32)}
    is_token_NK = ids_NK < num_token_ids
    num_tokens_N = is_token_NK.sum(axis=1)
    rest_N = np.where(num_tokens_N < num_token_ids, rest_N, 0.0).astype(np.float64)
    left_NK = np.where(is_token_NK, probs_NK, 0.0).astype(np.float64)
    mass_N = left_NK.sum(axis=1) + rest_N
    taught_N = (num_tokens_N > 0) & (mass_N > 0)
    share_N = np.where(taught_N, 1.0, 0.0) / np.where(taught_N, mass_N, 1.0)
    kept = {
        "token_ids_NK": ids_NK,
        "probs_NK": (left_NK * share_N[:, None]).astype(np.float32),
    }
    return {
        **_behind(kept, is_token_NK),
        "rest_N": (rest_N * share_N).astype(np.float32),
        "entropies_N": columns["entropies_N"],
        **_tally(1.0 - mass_N, taught_N),
    }


def _behind(columns: Columns, is_token_NK: Array) -> Columns:
    """Move dropped entries behind the others, in whose order nothing changes."""
    order_NK = np.argsort(~is_token_NK, axis=1, kind="stable")
    moved = {name: np.take_along_axis(values, order_NK, 1) for name, values in columns.items()}
    ids_NK = moved["token_ids_NK"]
    first_N1 = np.where(is_token_NK.any(axis=1), ids_NK[:, 0], 0)[:, None]
    is_left_NK = np.take_along_axis(is_token_NK, order_NK, 1)
    return moved | {"token_ids_NK": np.where(is_left_NK, ids_NK, first_N1.astype(ids_NK.dtype))}


def _tally(dropped_N: Array, taught_N: Array) -> Columns:
    tally = {"dropped_N": np.clip(dropped_N, 0.0, 1.0).astype(np.float32)}
    return tally if taught_N.all() else tally | {"untaught_N": ~taught_N}
