"""What a generator is asked for, and what it gives back.

Log-probs are of the raw distribution: natural log, temperature 1, all of the vocabulary, whatever
the tokens were drawn from.

Dimensions: A = generated tokens, K = likeliest tokens kept at each of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.models.engines.sequences import TokenIds


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to choose tokens and when to end; ``temperature`` 0 takes the likeliest."""

    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """One response: ids as they were generated, the stop token, if there is one, the last."""

    token_ids_A: TokenIds
    logprobs_A: npt.NDArray[np.float32]
    top_ids_AK: npt.NDArray[Any]
    top_logprobs_AK: npt.NDArray[np.float32]
    stopped: bool

    @property
    def is_empty(self) -> bool:
        """Whether the stop token is all there is."""
        return self.stopped and len(self.token_ids_A) == 1
