"""Losses over preference pairs: DPO, DCKD and ADPA, with the advantages of each support.

Per-position values come from ``token_losses``; means over tokens are taken response by response.
Float64 throughout. A step's loss is the mean over its pairs.

Dimensions: B = pairs, P = tokens of one response, V = the student's logits, K = kept tokens, U <= V
= the teachers' logits. All values in nats.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .token_losses import F64Array, log_softmax

Array = npt.NDArray[Any]


def dpo(logprobs_B2: Array, reference_B2: Array, beta: float = 0.1) -> F64Array:
    """Return DPO's loss [B] (arXiv 2305.18290, equation 7), chosen first.

    ``-log sigmoid(beta [(log pi(w) - log ref(w)) - (log pi(l) - log ref(l))])``, of sums of log p
    over a response's tokens.
    """
    ratios_B2 = np.asarray(logprobs_B2, np.float64) - np.asarray(reference_B2, np.float64)
    loss_B: F64Array = np.logaddexp(0.0, -beta * (ratios_B2[:, 0] - ratios_B2[:, 1]))
    return loss_B


def dckd(
    chosen_cross_entropy_P: Array,
    chosen_kl_P: Array,
    rejected_kl_P: Array,
    sft_weight: float = 1.0,
    alpha: float = 1.0,
    chosen_weight: float = 0.1,
    rejected_weight: float = 0.1,
) -> float:
    """Return DCKD's loss of one pair (arXiv 2502.17927).

    ``sft_weight NLL(chosen) + alpha [chosen_weight KL(chosen) + rejected_weight KL(rejected)]``.
    """
    kl = chosen_weight * np.mean(chosen_kl_P) + rejected_weight * np.mean(rejected_kl_P)
    return float(sft_weight * np.mean(chosen_cross_entropy_P) + alpha * kl)


def adpa(
    chosen_cross_entropy_P: Array,
    advantages: Sequence[Array],
    sft_weight: float = 1.0,
    gamma: float = 1.6,
) -> float:
    """Return ADPA's loss of one pair (arXiv 2502.17927, equation 11).

    ``sft_weight NLL(chosen) - gamma`` times the mean over the student's responses of the mean over
    tokens of ``expected_advantage``; ``advantages`` has an array [P] a response.
    """
    gained = float(np.mean([np.mean(advantage_P) for advantage_P in advantages]))
    return sft_weight * float(np.mean(chosen_cross_entropy_P)) - gamma * gained


def expected_advantage(
    logits_PV: Array, token_ids_PK: Array, values_PK: Array, rest_P: Array | float = 0.0
) -> F64Array:
    """Return ``sum_i pi(a_i) value_i + rest`` [P], over what the cache keeps of A.

    ``schemas.advantage_values.advantage_values`` returns ids, values and rest of any sparse
    support. Of ``threshold`` values are A over the chance of being kept, with tau less a constant
    that is the rest: an unbiased estimate. ``union_top_k``: the kept A less the rest's.
    ``as_released``: A, to be clipped to [1e-8, 1 - 1e-8]. A token that is there twice counts twice.
    """
    ids_PK = np.asarray(token_ids_PK, np.int64)
    shares_PK = np.exp(np.take_along_axis(log_softmax(logits_PV), ids_PK, axis=1))
    kept_P: F64Array = (shares_PK * np.asarray(values_PK, np.float64)).sum(axis=1)
    return kept_P + np.asarray(rest_P, np.float64)


def exact_expected_advantage(
    logits_PV: Array, teacher_logits_PU: Array, reference_logits_PU: Array, beta: float
) -> F64Array:
    """Return ``sum_a pi(a) beta [log p(a) - log ref(a)]`` [P]; a student's other tokens have 0."""
    advantages_PU = beta * (log_softmax(teacher_logits_PU) - log_softmax(reference_logits_PU))
    shares_PU = np.exp(log_softmax(logits_PV))[:, : advantages_PU.shape[1]]
    expected_P: F64Array = (shares_PU * advantages_PU).sum(axis=1)
    return expected_P
