"""Hidden states in whole steps, one step a row: codes of 8 bits, and the few that need more apart.

A state is ``step`` times a whole number. Numbers from -127 to 127 are stored as they are, -128
stands for the next of those that lie beyond, which follow in the order of the array. All components
have one step: what a language head makes of an error is nearly the same for each. Codes that are
scaled to fill a byte leave few levels to all but some outlying components (on SmolLM2-135M 70 times
the KL of this); in steps those take more bits, and entropy coding (zstd, in the shard) the rest.

The step is found where the rows are made (``stages.signals.teacher_logits.rounding``).

Dimensions: P = scored positions, D = hidden width, E = components beyond a byte.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MOST, BEYOND = 127, -128


def in_steps(hidden_PD: Array, step: float) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """Return codes [P, D] and those beyond [E]; to the nearest step, ties to even."""
    whole_PD = np.rint(np.asarray(hidden_PD, np.float32) / np.float32(step)).astype(np.int32)
    is_beyond_PD = np.abs(whole_PD) > MOST
    codes_PD = np.where(is_beyond_PD, BEYOND, whole_PD).astype(np.int8)
    return codes_PD, whole_PD[is_beyond_PD]


def num_beyond(codes_PD: Array) -> int:
    """Return how many codes stand for one beyond."""
    return int(np.count_nonzero(codes_PD == BEYOND))


def hidden_states(row: Mapping[str, Any]) -> Array:
    """Return the states [P, D] of a row of either ``exact`` encoding.

    float16 as they are stored, or float32 of those in steps.
    """
    if "hidden_PD" in row:
        return np.asarray(row["hidden_PD"])
    whole_PD = row["hidden_codes_PD"].astype(np.float32)
    whole_PD[row["hidden_codes_PD"] == BEYOND] = row["hidden_beyond_E"]
    return np.asarray(whole_PD * np.float32(row["hidden_step"]))
