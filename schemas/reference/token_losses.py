"""Losses at scored positions: cross-entropy, forward KL in each encoding, on-policy distillation.

``kd`` is ``w KL(p || s) + (1 - w) CE``, the soft target of Hinton et al. 2015 (arXiv 1503.02531) at
temperature 1; ``cross_entropy``, and ``sft`` on the tokens of responses, is ``-log s(next token)``.
The student's s is the softmax of all its logits. A step's loss is the mean over its positions.

Everything is computed in float64. Ids that no token uses are taken as they are: our own trainer,
which knows the tokenizer, drops a teacher's mass on them.

Dimensions: N = scored positions, V = the student's logits, U <= V = the teacher's, K = kept
entries. All values in nats.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64Array = npt.NDArray[np.float64]


def log_softmax(logits: Array) -> F64Array:
    """Return log-probs over the last axis."""
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    logprobs: F64Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logprobs


def cross_entropy(logits_NV: Array, next_token_ids_N: Array) -> F64Array:
    """Return ``-log s(next token)`` [N]."""
    return -_picked(log_softmax(logits_NV), np.asarray(next_token_ids_N)[:, None])[:, 0]


def threshold_kl(
    logits_NV: Array, token_ids_NK: Array, weights_NK: Array, entropies_N: Array
) -> F64Array:
    """Return ``-sum_i w_i log s(v_i) - H(p)`` [N], of ``unpack_threshold`` and ``entropies_P``.

    RS-KD's estimate (arXiv 2503.16870): unbiased over draws, so one position's may be negative. A
    token that is there twice counts twice.
    """
    logprobs_NK = _picked(log_softmax(logits_NV), token_ids_NK)
    cross_N: F64Array = -(np.asarray(weights_NK, np.float64) * logprobs_NK).sum(axis=1)
    return cross_N - np.asarray(entropies_N, np.float64)


def top_k_kl(logits_NV: Array, token_ids_NK: Array, probs_NK: Array, rest_N: Array) -> F64Array:
    """Return the KL [N] between K + 1 buckets, of ``unpack_top_k``: a lower bound of the whole KL.

    ``sum_i p_i log(p_i / s_i) + r log(r / R)``, r the teacher's mass outside its K tokens and R the
    student's. float16 leaves the teacher's buckets a little off one: they are divided by their sum.
    """
    logprobs_NV = log_softmax(logits_NV)
    kept_NK = _picked(logprobs_NV, token_ids_NK)
    outside_NV = np.exp(logprobs_NV)
    np.put_along_axis(outside_NV, np.asarray(token_ids_NK, np.int64), 0.0, axis=1)
    probs_NK, rest_N = np.asarray(probs_NK, np.float64), np.asarray(rest_N, np.float64)
    mass_N = probs_NK.sum(axis=1) + rest_N
    probs_NK, rest_N = probs_NK / mass_N[:, None], rest_N / mass_N
    kept_N = (_x_log_x(probs_NK) - probs_NK * kept_NK).sum(axis=1)
    log_rest_N = np.log(outside_NV.sum(axis=1), where=rest_N > 0, out=np.zeros_like(rest_N))
    kl_N: F64Array = kept_N + _x_log_x(rest_N) - rest_N * log_rest_N
    return kl_N


def exact_kl(logits_NV: Array, teacher_logits_NU: Array) -> F64Array:
    """Return ``sum_v p_v log(p_v / s_v)`` [N]; p is the softmax of ``head.Head.logits``.

    A student's tokens from U on have teacher probability 0.
    """
    teacher_NU = log_softmax(teacher_logits_NU)
    student_NU = log_softmax(logits_NV)[:, : teacher_NU.shape[1]]
    kl_N: F64Array = (np.exp(teacher_NU) * (teacher_NU - student_NU)).sum(axis=1)
    return kl_N


def geometric_kl(
    logits_NV: Array, teachers_logits: Sequence[Array], weights: Sequence[float]
) -> F64Array:
    """Return the KL [N] to ``prod_t p_t ** w_t / Z``, of several teachers' logits [N, U].

    Weights are divided by their sum. A token that one teacher lacks has probability 0. Of the
    arithmetic mixture our own trainer's is the mean of the teachers' KLs by these weights.
    """
    num_ids = min(np.shape(logits_NU)[1] for logits_NU in teachers_logits)
    logprobs_NU = np.zeros((len(logits_NV), num_ids))
    for logits_NU, weight in zip(teachers_logits, weights, strict=True):
        logprobs_NU += weight / sum(weights) * log_softmax(logits_NU)[:, :num_ids]
    return exact_kl(logits_NV, logprobs_NU)


def kd(kl_N: Array, cross_entropy_N: Array, weight: float = 1.0) -> F64Array:
    """Return ``weight KL + (1 - weight) CE`` [N]."""
    mixed_N: F64Array = weight * np.asarray(kl_N) + (1.0 - weight) * np.asarray(cross_entropy_N)
    return mixed_N


def opd(
    logits_NV: Array,
    token_ids_N: Array,
    teacher_logprobs_N: Array,
    writer_logprobs_N: Array,
    clip: float = 0.2,
) -> F64Array:
    """Return ``-min(r A, clip(r, 1 - eps, 1 + eps) A)`` [N] at tokens y that a student sampled.

    PPO's surrogate (arXiv 1707.06347, equation 7) of the ratio ``r = s(y) / q(y)`` to the student q
    that wrote y, with the advantage ``A = log p(y) - log s(y)`` of Lightning OPD (arXiv 2604.13010,
    equation 2); of A no gradient is taken.
    """
    own_N = _picked(log_softmax(logits_NV), np.asarray(token_ids_N)[:, None])[:, 0]
    ratio_N = np.exp(own_N - np.asarray(writer_logprobs_N, np.float64))
    advantage_N = np.asarray(teacher_logprobs_N, np.float64) - own_N
    bound_N = np.clip(ratio_N, 1.0 - clip, 1.0 + clip)
    return np.asarray(-np.minimum(ratio_N * advantage_N, bound_N * advantage_N))


def _picked(values_NV: F64Array, token_ids_NK: Array) -> F64Array:
    return np.take_along_axis(values_NV, np.asarray(token_ids_NK, np.int64), axis=1)


def _x_log_x(values: F64Array) -> F64Array:
    logs = np.log(values, where=values > 0, out=np.zeros_like(values))
    return np.asarray(values * logs, np.float64)
