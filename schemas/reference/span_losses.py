"""Losses over spans of text, of a student and a teacher whose tokenizers differ.

``alm`` is approximate likelihood matching (arXiv 2503.20083): the text goes on with a span's bytes
or it does not, and the KL is between these two outcomes at a temperature tau.

Everything is computed in float64. Dimensions: N = scored positions, S = spans. All values in nats.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64Array = npt.NDArray[np.float64]


def span_sums(logprobs_N: Array, lengths_S: Array) -> F64Array:
    """Return the sum [S] of the next tokens' log-probs over each span; spans lie end to end."""
    ends_S = np.cumsum(lengths_S)
    return np.array(
        [
            np.sum(logprobs_N[end - length : end], dtype=np.float64)
            for end, length in zip(ends_S, lengths_S, strict=True)
        ]
    )


def alm(student_S: Array, teacher_S: Array, temperature: float = 100.0) -> F64Array:
    """Return ``tau KL(b(p) || b(q))`` [S] of log-probs, ``b(x) = (x^(1/tau), 1 - x^(1/tau))``.

    The student's log-probs are below 0. A step's loss is the sum over its spans by its positions.
    """
    log_q_S = np.asarray(student_S, np.float64) / temperature
    log_p_S = np.asarray(teacher_S, np.float64) / temperature
    p_S, q_S = np.exp(log_p_S), np.exp(log_q_S)
    kept_S: F64Array = p_S * (log_p_S - log_q_S)
    ratio_S = np.divide(1 - p_S, 1 - q_S)
    other_S = (1 - p_S) * np.log(ratio_S, where=ratio_S > 0, out=np.zeros_like(ratio_S))
    divergence_S: F64Array = temperature * (kept_S + other_S)
    return divergence_S
