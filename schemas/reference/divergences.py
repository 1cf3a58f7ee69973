"""Divergences between a whole teacher distribution and a student's, at a temperature.

p and s are the softmax of logits over the temperature T; ``losses.divergences`` of our own trainer
has the papers. ``kd`` of ``token_losses`` mixes them with cross-entropy, after the factor that
keeps gradients of all temperatures alike: ``T ** 2``, and T for ``total_variation``.

Everything is computed in float64. A student's tokens from U on have teacher probability 0. What our
own trainer's T, alpha and beta are is what these are given.

Dimensions: N = scored positions, V = the student's logits, U <= V = the teacher's. All values in
nats, but for ``total_variation``.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from .token_losses import F64Array, log_softmax

Array = npt.NDArray[Any]


def forward_kl(logits_NV: Array, teacher_logits_NU: Array, temperature: float = 1.0) -> F64Array:
    """Return ``sum_v p_v log(p_v / s_v)`` [N]."""
    student_NV, teacher_NV = _logprobs(logits_NV, teacher_logits_NU, temperature)
    return _kl(teacher_NV, student_NV)


def reverse_kl(logits_NV: Array, teacher_logits_NU: Array, temperature: float = 1.0) -> F64Array:
    """Return ``sum_v s_v log(s_v / p_v)`` [N] over the teacher's tokens (arXiv 2306.08543).

    Of a student with others, s is divided by its sum S over the teacher's, and ``-log S`` is added.
    """
    student_NV, teacher_NV = _logprobs(logits_NV, teacher_logits_NU, temperature)
    known_NU = student_NV[:, : np.shape(teacher_logits_NU)[1]]
    log_sum_N = np.log(np.exp(known_NU).sum(axis=1))
    teacher_NU = teacher_NV[:, : known_NU.shape[1]]
    kl_N: F64Array = _kl(known_NU - log_sum_N[:, None], teacher_NU) - log_sum_N
    return kl_N


def skewed_kl(
    logits_NV: Array, teacher_logits_NU: Array, temperature: float = 1.0, alpha: float = 0.1
) -> F64Array:
    """Return ``KL(p || alpha p + (1 - alpha) s)`` [N] (arXiv 2402.03898)."""
    student_NV, teacher_NV = _logprobs(logits_NV, teacher_logits_NU, temperature)
    return _kl(teacher_NV, _mixed(teacher_NV, student_NV, alpha))


def skewed_reverse_kl(
    logits_NV: Array, teacher_logits_NU: Array, temperature: float = 1.0, alpha: float = 0.1
) -> F64Array:
    """Return ``KL(s || (1 - alpha) p + alpha s)`` [N] (arXiv 2402.03898)."""
    student_NV, teacher_NV = _logprobs(logits_NV, teacher_logits_NU, temperature)
    return _kl(student_NV, _mixed(student_NV, teacher_NV, alpha))


def jensen_shannon(
    logits_NV: Array, teacher_logits_NU: Array, temperature: float = 1.0, beta: float = 0.5
) -> F64Array:
    """Return ``beta KL(p || m) + (1 - beta) KL(s || m)`` [N] (arXiv 2306.13649).

    m is ``beta p + (1 - beta) s``.
    """
    student_NV, teacher_NV = _logprobs(logits_NV, teacher_logits_NU, temperature)
    mixed_NV = _mixed(teacher_NV, student_NV, beta)
    return beta * _kl(teacher_NV, mixed_NV) + (1.0 - beta) * _kl(student_NV, mixed_NV)


def total_variation(
    logits_NV: Array, teacher_logits_NU: Array, temperature: float = 1.0
) -> F64Array:
    """Return ``sum_v |p_v - s_v| / 2`` [N], from 0 to 1."""
    student_NV, teacher_NV = _logprobs(logits_NV, teacher_logits_NU, temperature)
    distance_N: F64Array = np.abs(np.exp(teacher_NV) - np.exp(student_NV)).sum(axis=1) / 2
    return distance_N


def _logprobs(
    logits_NV: Array, teacher_logits_NU: Array, temperature: float
) -> tuple[F64Array, F64Array]:
    """Return the student's and the teacher's log-probs, both [N, V]."""
    student_NV = log_softmax(np.asarray(logits_NV, np.float64) / temperature)
    teacher_NU = log_softmax(np.asarray(teacher_logits_NU, np.float64) / temperature)
    teacher_NV = np.full(student_NV.shape, -np.inf)
    teacher_NV[:, : teacher_NU.shape[1]] = teacher_NU
    return student_NV, teacher_NV


def _mixed(one_NV: F64Array, other_NV: F64Array, share: float) -> F64Array:
    """Return the log of ``share`` of the one and the rest of the other."""
    mixed_NV: F64Array = np.logaddexp(one_NV + np.log(share), other_NV + np.log1p(-share))
    return mixed_NV


def _kl(one_NV: F64Array, other_NV: F64Array) -> F64Array:
    """Return the sum of ``exp(one) (one - other)``, of nothing where the one is 0."""
    apart_NV = np.subtract(one_NV, other_NV, where=np.isfinite(one_NV), out=np.zeros_like(one_NV))
    kl_N: F64Array = (np.exp(one_NV) * apart_NV).sum(axis=1)
    return kl_N
