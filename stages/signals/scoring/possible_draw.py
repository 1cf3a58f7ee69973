"""Whether kept entries are the draw that their seed makes of a live distribution (``encoding``).

A draw is a function of the distribution and of uniforms that follow from seed, ``sample_id`` and
position, so it is made again from the live distribution, each step of it given what is stored:

- *head*: no token outside the head is above the threshold, none inside below it (``p >= tau_h``,
  tau_h = the rest's mass over the number of sampled entries), and each code is one of the two
  levels that its fraction lies between, the one that its uniform rounds to.
- *tail*: sampled entry j holds the point ``(u + j) tau_h`` of the rest's running mass in the order
  of ids, and with ``tau`` there are ``ceil(sum_v min(1, p_v / tau))`` entries.

Each difference is a mass of probability, 0 for the draw itself. Two distributions that are apart by
``d = sum_v |p_v - q_v|`` give differences of at most d: a token of p near tau_h may be in the head
of one and in the tail of the other, but running masses and thresholds move by no more than d. So d
between two live passes says what is to be allowed. A wrong distribution is missed by an entry only
where its draw would have been the same.

Dimensions: P = positions, V = vocabulary, K = the most entries of a position.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.distribution import STICK_LEVELS, tail_ids
from stages.signals.scoring.agreement import F64Array, Row, beyond_levels

Array = npt.NDArray[Any]
_NEARLY_ONE = 1.0 - 2e-5  # as the encoder, which has 1e-5, and float32
_SLACK = 2e-6
_LAST_CODE = len(STICK_LEVELS) - 1


@dataclass(frozen=True, slots=True)
class Entries:
    """Stored entries side by side: ids [P, K], the head first; codes [P, K] of the head.

    Without codes the head's values are not those of a broken stick, and nothing is said of them.
    """

    ids_PK: npt.NDArray[np.int64]
    num_head_P: npt.NDArray[np.int64]
    num_tail_P: npt.NDArray[np.int64]
    codes_PK: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, row: Row) -> "Entries":
        """Lay out a row of either ``threshold`` layout."""
        num_head_P = np.asarray(row["num_head_P"], np.int64)
        if "token_ids_PK" in row:
            ids_PK = np.asarray(row["token_ids_PK"], np.int64)
            num_tail_P = ids_PK.shape[1] - num_head_P
            codes = row["head_codes_E"]
        else:
            num_tail_P = np.asarray(row["num_tail_P"], np.int64)
            codes = row["head_codes_H"]
            entry_K = np.arange(int((num_head_P + num_tail_P).max(initial=1)))
            ids_PK = np.zeros((len(num_head_P), len(entry_K)), np.int64)
            is_head_PK = entry_K < num_head_P[:, None]
            in_use_PK = entry_K < (num_head_P + num_tail_P)[:, None]
            ids_PK[is_head_PK] = row["head_ids_H"]
            ids_PK[in_use_PK & ~is_head_PK] = tail_ids(row)
        is_head_PK = np.arange(ids_PK.shape[1]) < num_head_P[:, None]
        codes_PK = np.zeros(ids_PK.shape, np.int64)
        codes_PK[is_head_PK] = codes
        return cls(ids_PK, num_head_P, num_tail_P, codes_PK)

    def at(self, places_P: npt.NDArray[np.int64]) -> "Entries":
        """Return those of some positions."""
        return Entries(
            self.ids_PK[places_P],
            self.num_head_P[places_P],
            self.num_tail_P[places_P],
            None if self.codes_PK is None else self.codes_PK[places_P],
        )

    @property
    def is_head_PK(self) -> npt.NDArray[np.bool_]:
        """Which entries are of the head."""
        return np.arange(self.ids_PK.shape[1]) < self.num_head_P[:, None]

    @property
    def is_kept_PK(self) -> npt.NDArray[np.bool_]:
        """Which entries there are."""
        return np.arange(self.ids_PK.shape[1]) < (self.num_head_P + self.num_tail_P)[:, None]


def draw_apart(
    entries: Entries, probs_PV: F64Array, uniforms_PN: Array, *, tau: float | None, most: int
) -> dict[str, F64Array]:
    """Return how far the entries are from the draw of live ``probs_PV``: ``head`` and ``tail`` [P].

    ``uniforms_PN`` has the offset of each position, then one number for each entry's rounding;
    ``tau`` is None where every position has ``most`` entries.
    """
    is_head_PK, num_tail_P = entries.is_head_PK, entries.num_tail_P
    has_tail_P = num_tail_P > 0
    held_PK = np.where(is_head_PK, np.take_along_axis(probs_PV, entries.ids_PK, axis=1), 0.0)
    rest_PV = probs_PV.copy()
    positions, slots = np.nonzero(is_head_PK)
    rest_PV[positions, entries.ids_PK[positions, slots]] = 0.0
    running_PV = rest_PV.cumsum(axis=1)
    rest_P = running_PV[:, -1]
    left_PK = rest_P[:, None] + held_PK[:, ::-1].cumsum(axis=1)[:, ::-1]  # of each and all after
    share_P = rest_P / np.maximum(num_tail_P, 1)
    sticks_PK = _sticks(entries, held_PK, left_PK, uniforms_PN)
    least_P = np.where(is_head_PK, held_PK, np.inf).min(axis=1)
    largest_P = rest_PV.max(axis=1)
    above_P = np.where(has_tail_P, largest_P - share_P, largest_P - least_P)
    above_P = np.where(has_tail_P | (entries.num_head_P > 0), above_P, 0.0)
    num_left_PK = (entries.num_head_P + num_tail_P)[:, None] - np.arange(held_PK.shape[1])
    below_PK = left_PK / np.maximum(num_left_PK, 1) * _NEARLY_ONE - held_PK
    below_PK = np.where(is_head_PK & has_tail_P[:, None], below_PK, 0.0)
    count_P, is_last_P = np.zeros(len(rest_P)), np.zeros(len(rest_P), bool)
    if tau is not None and entries.codes_PK is not None:
        fewer_P, more_P = _count(entries, probs_PV, tau, most)
        last_P = np.maximum(entries.num_head_P - 1, 0)[:, None]
        is_last_P = ~has_tail_P & (
            np.take_along_axis(entries.codes_PK, last_P, 1)[:, 0] == _LAST_CODE
        )
        # All after a fraction that was rounded to 1 are left out; else it is of no other entry.
        stick_P = np.take_along_axis(sticks_PK, last_P, 1)[:, 0]
        np.put_along_axis(sticks_PK, last_P, np.where(is_last_P, 0.0, stick_P)[:, None], 1)
        either_P = np.minimum(more_P, stick_P)
        count_P = np.maximum(fewer_P, np.where(is_last_P, either_P, more_P))
    head_P = np.maximum.reduce([sticks_PK.max(axis=1), above_P, below_PK.max(axis=1)])
    tail_P = _points(entries, running_PV, share_P, uniforms_PN[:, 0])
    return {"head": np.maximum(head_P, 0.0), "tail": np.maximum(tail_P, count_P)}


def _sticks(entries: Entries, held_PK: F64Array, left_PK: F64Array, uniforms_PN: Array) -> F64Array:
    """Return by what mass each head entry misses what its code stands for."""
    if entries.codes_PK is None:
        return np.zeros_like(held_PK)
    fractions_PK = np.divide(held_PK, left_PK, out=np.ones_like(held_PK), where=left_PK > 0)
    uniforms_PK = uniforms_PN[:, 1 : 1 + held_PK.shape[1]]
    missed_PK = beyond_levels(STICK_LEVELS, entries.codes_PK, uniforms_PK, fractions_PK) * left_PK
    return np.where(entries.is_head_PK, missed_PK, 0.0)


def _count(
    entries: Entries, probs_PV: F64Array, tau: float, most: int
) -> tuple[F64Array, F64Array]:
    """Return by what mass there are too many entries, and too few.

    There is one for each tau of mass that ``min(p, tau)`` has, begun or full.
    """
    asked_P = np.minimum(probs_PV, tau).sum(axis=1)
    num_P = entries.num_head_P + entries.num_tail_P
    many_P = np.where(num_P > 1, (num_P - 1) * tau - asked_P, 0.0)
    few_P = np.where(num_P < most, asked_P - num_P * tau, 0.0)
    return np.maximum(many_P, 0.0), np.maximum(few_P - _SLACK * tau, 0.0)


def _points(
    entries: Entries, running_PV: F64Array, share_P: F64Array, offsets_P: Array
) -> F64Array:
    """Return by what mass the sampled ids miss the points of the systematic sample, at most [P]."""
    rank_PK = np.arange(entries.ids_PK.shape[1]) - entries.num_head_P[:, None]
    is_tail_PK = (rank_PK >= 0) & (rank_PK < entries.num_tail_P[:, None])
    points_PK = (np.asarray(offsets_P, np.float64)[:, None] + rank_PK) * share_P[:, None]
    upto_PK = np.take_along_axis(running_PV, entries.ids_PK, axis=1)
    before_PK = np.take_along_axis(running_PV, np.maximum(entries.ids_PK - 1, 0), axis=1)
    before_PK = np.where(entries.ids_PK > 0, before_PK, 0.0)
    missed_PK = np.maximum(before_PK - points_PK, points_PK - upto_PK)
    return np.asarray(np.where(is_tail_PK, missed_PK, 0.0).max(axis=1)).clip(min=0.0)
