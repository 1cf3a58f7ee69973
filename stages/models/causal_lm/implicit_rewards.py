"""The implicit reward of two models' log-probs, and how often it prefers the chosen response.

``beta (log p_teacher - log p_reference)``, DPO (arXiv 2305.18290, equation 5), less what the prompt
alone fixes: it is equal for all responses to one prompt. No torch in here.

Dimensions: P = prompts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Preference:
    """How often the chosen response has the better score, and by how much in the mean."""

    accuracy: float
    margin: float


def implicit_rewards(teacher_logprobs: Array, reference_logprobs: Array, beta: float) -> F64Array:
    """Return ``beta (log p_teacher - log p_reference)`` of each response, nats."""
    difference: F64Array = np.subtract(teacher_logprobs, reference_logprobs, dtype=np.float64)
    return beta * difference


def preference(chosen_P: Array, rejected_P: Array) -> Preference:
    """Compare the scores of the two responses to each prompt."""
    margins_P = np.subtract(chosen_P, rejected_P, dtype=np.float64)
    return Preference(float((margins_P > 0).mean()), float(margins_P.mean()))
