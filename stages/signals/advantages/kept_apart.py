"""How far kept advantages are from live ones, support by support, over the whole vocabulary.

Of drawn supports the draw is made again from the live models' log-probs, as in
``scoring.possible_draw``: which tokens are kept follows from these and from the row's uniforms.
Every function returns differences [P] by measure, and the live numbers that they are about, of
which two live passes are compared: [P] or [P, N], for a draw a number for each token.

Dimensions: P = positions, V = vocabulary, K = kept tokens of a position at most.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.advantage_values import LEVEL_SIZES, advantage_values
from stages.signals.advantages.drawing import of_rest, weighed_about
from stages.signals.advantages.stage import (
    ReleasedSupport,
    Support,
    ThresholdSupport,
    UnionTopKSupport,
)
from stages.signals.advantages.supports import (
    RELEASED_FLOOR,
    Scored,
    StudentTop,
    drawing_weights,
    mean_distribution,
)
from stages.signals.scoring.agreement import (
    F64Array,
    Row,
    beyond_float16,
    beyond_levels,
    beyond_mantissa,
)
from stages.signals.scoring.possible_draw import Entries, draw_apart

Array = npt.NDArray[Any]
Apart = tuple[dict[str, F64Array], dict[str, F64Array]]
DRAWS = ("draw",)  # measures of which the differences of all tokens are summed
_LEAST_MASS = 1e-30
_ABSENT = 1e3  # nats: of a token of the student's that is not kept, which no rounding explains


def kept_apart(
    support: Support, row: Row, at: slice, scored: Scored, student: StudentTop, uniforms_PN: Array
) -> Apart:
    """Compare the positions ``at`` of a stored row, of any support but ``exact``.

    ``student`` and ``uniforms_PN`` are those of these positions.
    """
    match support:
        case ThresholdSupport(tau=float(tau), max_k=int(max_k)):
            return _tau_apart(row, at, scored, student, uniforms_PN, tau, max_k)
        case ThresholdSupport():
            return _k_apart(row, at, scored, student, uniforms_PN)
        case UnionTopKSupport(k=k):
            return _union_apart(row, at, scored, student, k)
        case ReleasedSupport(k=k):
            return _released_apart(row, at, scored, k)
    return {}, {}


def _tau_apart(
    row: Row,
    at: slice,
    scored: Scored,
    student: StudentTop,
    uniforms_PN: Array,
    tau: float,
    max_k: int,
) -> Apart:
    counts_P = np.asarray(row["num_entries_P"], np.int64)
    ids_PK = advantage_values(row)[0]
    codes_PK = np.zeros(ids_PK.shape, np.int64)
    codes_PK[np.arange(ids_PK.shape[1]) < counts_P[:, None]] = row["value_codes_E"]
    ids_PK, codes_PK, counts_P = ids_PK[at], codes_PK[at], counts_P[at]
    is_kept_PK = np.arange(ids_PK.shape[1]) < counts_P[:, None]
    mean_PV, guess_PV = mean_distribution(scored, student)
    advantages_PV = scored.advantages()
    live_rest_P = _numpy(of_rest(advantages_PV, guess_PV))
    rest_P = torch.from_numpy(np.asarray(row["rest_advantages_P"][at], np.float32))
    least_PV = tau * scored.beta / mean_PV.clamp_(min=_LEAST_MASS)
    found = weighed_about(rest_P.to(mean_PV), advantages_PV, least_PV, max_k=max_k)
    chances_PV = _numpy(found.chances_PV)
    ends_PK = chances_PV.cumsum(axis=1)
    upto_PK = np.take_along_axis(ends_PK, ids_PK, axis=1)
    before_PK = upto_PK - np.take_along_axis(chances_PV, ids_PK, axis=1)
    points_PK = uniforms_PN[:, :1].astype(np.float64) + np.arange(ids_PK.shape[1])
    missed_PK = np.where(is_kept_PK, np.maximum(before_PK - points_PK, points_PK - upto_PK), 0.0)
    total_P, offset_P = ends_PK[:, -1], uniforms_PN[:, 0].astype(np.float64)
    many_P = np.where(counts_P > 0, counts_P - 1 + offset_P - total_P, 0.0)
    few_P = np.where(counts_P < max_k, total_P - counts_P - offset_P, 0.0)
    sizes_PK = np.exp2(np.take_along_axis(_numpy(found.octaves_PV), ids_PK, axis=1))
    differences_PK = np.take_along_axis(_numpy(found.differences_PV), ids_PK, axis=1)
    live_PK = np.maximum(np.abs(differences_PK), sizes_PK)
    rounding_PK = uniforms_PN[:, 1 : 1 + ids_PK.shape[1]]
    value_PK = beyond_levels(LEVEL_SIZES, codes_PK >> 1, rounding_PK, live_PK) / live_PK
    is_other_sign_PK = (differences_PK < 0) != (codes_PK & 1).astype(bool)
    value_PK += np.where(is_other_sign_PK, np.abs(differences_PK) / sizes_PK, 0.0)
    apart = {
        "rest_advantages_P": beyond_mantissa(row["rest_advantages_P"][at], live_rest_P),
        "values": _most(np.where(is_kept_PK, value_PK, 0.0)),
        "draw": np.maximum.reduce([_most(missed_PK), many_P, few_P]).clip(min=0.0),
    }
    live = {
        "rest_advantages_P": live_rest_P,
        "values": np.where(is_kept_PK, differences_PK / sizes_PK, 0.0),
        "draw": chances_PV,
    }
    return apart, live


def _k_apart(row: Row, at: slice, scored: Scored, student: StudentTop, uniforms_PN: Array) -> Apart:
    ids_PK = np.asarray(row["token_ids_PK"][at], np.int64)
    logs_PK = row["log_inclusions_PK"][at]
    num_head_P = (logs_PK == 0).cumprod(axis=1).sum(axis=1)
    entries = Entries(ids_PK, num_head_P, ids_PK.shape[1] - num_head_P)
    weights_PV = _numpy(drawing_weights(scored, student))
    weights_PV /= weights_PV.sum(axis=1, keepdims=True)
    drawn = draw_apart(entries, weights_PV, uniforms_PN, tau=None, most=ids_PK.shape[1])
    held_PK = np.take_along_axis(weights_PV, ids_PK, axis=1)
    head_PK = np.where(entries.is_head_PK, held_PK, 0.0)
    share_P = (1.0 - head_PK.sum(axis=1)) / np.maximum(entries.num_tail_P, 1)
    live_PK = np.log(np.maximum(held_PK, _LEAST_MASS) / share_P[:, None].clip(min=_LEAST_MASS))
    live_PK = np.where(entries.is_head_PK, 0.0, live_PK.clip(max=0.0))
    advantages_PK = np.take_along_axis(_numpy(scored.advantages()), ids_PK, axis=1)
    apart = {
        "advantages_PK": _most(beyond_mantissa(row["advantages_PK"][at], advantages_PK)),
        "log_inclusions_PK": _most(beyond_float16(logs_PK, live_PK)),
        "draw": np.maximum(drawn["head"], drawn["tail"]),
    }
    live = {"advantages_PK": advantages_PK, "log_inclusions_PK": live_PK, "draw": weights_PV}
    return apart, live


def _union_apart(row: Row, at: slice, scored: Scored, student: StudentTop, k: int) -> Apart:
    counts_P = np.asarray(row["num_entries_P"], np.int64)
    ends_P = counts_P.cumsum()
    entries = slice(int(ends_P[at.start] - counts_P[at.start]), int(ends_P[at][-1]))
    counts_P = counts_P[at]
    is_kept_PK = np.arange(int(counts_P.max())) < counts_P[:, None]
    ids_PK = np.zeros(is_kept_PK.shape, np.int64)
    ids_PK[is_kept_PK] = row["token_ids_E"][entries]
    advantages_PK = np.zeros(is_kept_PK.shape)
    advantages_PK[is_kept_PK] = row["advantages_E"][entries]
    logs = _numpy(scored.aligned_PV), _numpy(scored.reference_PV)
    is_stored_PV = _marked(ids_PK, is_kept_PK, logs[0].shape)
    student_PK = _numpy(student.token_ids_PS[:, :k]).astype(np.int64)
    known_PK = student_PK < logs[0].shape[1]
    is_students_PV = _marked(student_PK * known_PK, known_PK, logs[0].shape)
    below_PV = np.where(is_students_PV, 0.0, np.inf)
    missing_P = np.where((is_students_PV & ~is_stored_PV).any(axis=1), _ABSENT, 0.0)
    for logs_PV in logs:
        least_P1 = np.partition(logs_PV, -k, axis=1)[:, -k, None]
        below_PV = np.minimum(below_PV, (least_P1 - logs_PV).clip(min=0.0))
        above_PV = np.where(is_stored_PV, 0.0, (logs_PV - least_P1).clip(min=0.0))
        missing_P = np.maximum(missing_P, above_PV.max(axis=1))
    choice_P = np.maximum(missing_P, np.where(is_stored_PV, below_PV, 0.0).max(axis=1))
    rests = [np.logaddexp.reduce(np.where(is_stored_PV, -np.inf, p), axis=1) for p in logs]
    with np.errstate(invalid="ignore"):
        rest_P = np.where(np.isfinite(rests[0]), (rests[0] - rests[1]) * scored.beta, 0.0)
    live_PK = np.take_along_axis(_numpy(scored.advantages()), ids_PK, axis=1)
    missed_PK = np.where(is_kept_PK, beyond_float16(advantages_PK, live_PK), 0.0)
    apart = {
        "choice": choice_P,
        "advantages": _most(missed_PK),
        "rest_advantages_P": beyond_float16(row["rest_advantages_P"][at], rest_P),
    }
    held = [np.take_along_axis(logs_PV, ids_PK, axis=1) for logs_PV in logs]
    return apart, {
        "choice": np.concatenate(held, axis=1),
        "advantages": np.where(is_kept_PK, live_PK, 0.0),
        "rest_advantages_P": rest_P,
    }


def _released_apart(row: Row, at: slice, scored: Scored, k: int) -> Apart:
    """Compare with the value of a token that the reference has among its k, or of one it has not.

    Whichever is near: a log-prob at the border may be on either side of it.
    """
    ids_PK = np.asarray(row["token_ids_PK"][at], np.int64)
    stored_PK = row["advantages_PK"][at]
    aligned_PV, reference_PV = _numpy(scored.aligned_PV), _numpy(scored.reference_PV)
    held_PK = np.take_along_axis(aligned_PV, ids_PK, axis=1)
    others_PV = aligned_PV.copy()
    np.put_along_axis(others_PV, ids_PK, -np.inf, axis=1)
    choice_P = (others_PV.max(axis=1) - held_PK.min(axis=1)).clip(min=0.0)
    border_P1 = np.partition(reference_PV, -k, axis=1)[:, -k, None]
    theirs_PK = np.take_along_axis(reference_PV, ids_PK, axis=1)
    floor_P1 = np.log(np.maximum(np.exp(held_PK.min(axis=1, keepdims=True)), RELEASED_FLOOR))
    known_PK = beyond_float16(stored_PK, held_PK - theirs_PK)
    known_PK = known_PK + (border_P1 - theirs_PK).clip(min=0.0)
    missing_PK = beyond_float16(stored_PK, held_PK - floor_P1)
    missing_PK = missing_PK + (theirs_PK - border_P1).clip(min=0.0)
    apart = {"choice": choice_P, "advantages": _most(np.minimum(known_PK, missing_PK))}
    both_PK = np.concatenate([held_PK, theirs_PK], axis=1)
    return apart, {"choice": held_PK, "advantages": both_PK}


def _marked(
    ids_PK: npt.NDArray[np.int64], is_one_PK: npt.NDArray[np.bool_], shape: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    marked_PV = np.zeros(shape, bool)
    positions, slots = np.nonzero(is_one_PK)
    marked_PV[positions, ids_PK[positions, slots]] = True
    return marked_PV


def _most(values_PK: F64Array) -> F64Array:
    return np.asarray(values_PK.max(axis=1, initial=0.0))


def _numpy(values: Tensor) -> F64Array:
    return np.asarray(values.double().cpu().numpy())
