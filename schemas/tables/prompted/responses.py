"""Table ``responses``: what a model answered to prompts of preference pairs or conversations.

Token ids are those that were generated, never text tokenised again. A response that ended by itself
has its stop token as last token; one that ran out of tokens has none. Log-probs are of the *raw*
distribution (temperature 1, before any sampling processor), natural log.

Dimensions: T = tokens of the prompt, N = responses to it, A = tokens of all N end to end,
K = likeliest tokens kept at each of them.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...table import MOST_LOGPROB, TOKEN_ID, Column, Table

Array = npt.NDArray[Any]
FINISH_REASONS: Final = ("length", "stop")  # as they are numbered in the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """A model's N responses to one prompt."""

    sample_id: Annotated[str, Column(pa.string(), "joins preference_pairs.sample_id")]
    prompt_ids_T: Annotated[Array, Column(TOKEN_ID, "equal to the pair's", dims="T")]
    response_ids_A: Annotated[Array, Column(TOKEN_ID, "as generated, end to end", dims="A")]
    response_lengths_N: Annotated[Array, Column(pa.int32(), "tokens of each", dims="N")]
    finish_reasons_N: Annotated[Array, Column(pa.uint8(), "0 length, 1 stop", dims="N", high=1)]
    logprobs_A: Annotated[
        Array,
        Column(
            pa.float32(), "student's log p of each token", dims="A", unit="nats", high=MOST_LOGPROB
        ),
    ]
    top_ids_AK: Annotated[
        Array,
        Column(TOKEN_ID, "student's likeliest, by falling probability", dims="AK", distinct=True),
    ]
    top_logprobs_AK: Annotated[
        Array,
        Column(
            pa.float16(),
            "student's log p of those",
            dims="AK",
            unit="nats",
            low=-math.inf,
            high=MOST_LOGPROB,
            falling=True,
        ),
    ]

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        num_tokens = len(self.response_ids_A)
        lengths_N = np.asarray(self.response_lengths_N, np.int64)
        columns = {len(self.logprobs_A), len(self.top_ids_AK), len(self.top_logprobs_AK)}
        problem = ""
        if not len(lengths_N) or (lengths_N < 1).any() or int(lengths_N.sum()) != num_tokens:
            problem = f"responses of {lengths_N.tolist()} tokens, {num_tokens} are there"
        elif columns != {num_tokens} or len(self.finish_reasons_N) != len(lengths_N):
            problem = f"{num_tokens} tokens beside {sorted(columns)} log-probs"
        elif not len(self.prompt_ids_T):
            problem = "the prompt has no token"
        if problem:
            raise ValueError(f"sample {self.sample_id}: {problem}")

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of all responses."""
        return len(self.prompt_ids_T) + len(self.response_ids_A)

    @property
    def num_positions(self) -> int:
        """Tokens generated, each with its scores."""
        return len(self.response_ids_A)


RESPONSES = Table(Responses, name="responses", version=1)
