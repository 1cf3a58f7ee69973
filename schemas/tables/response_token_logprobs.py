"""Table ``response_token_logprobs``: a model's log-prob of each token of each response to a prompt.

What on-policy distillation reads of the teacher (objective ``opd``). Values are of the *raw*
distribution (temperature 1, before any sampling processor), natural log.

Dimensions: N = responses to one prompt, A = tokens of all N end to end.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..table import MOST_LOGPROB, Column, Table

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseTokenLogprobs:
    """Scores of the tokens of one prompt's responses."""

    sample_id: Annotated[str, Column(pa.string(), "joins preference_pairs or responses.sample_id")]
    token_logprobs_A: Annotated[
        Array,
        Column(pa.float32(), "log p of each token", dims="A", unit="nats", high=MOST_LOGPROB),
    ]
    response_num_tokens_N: Annotated[Array, Column(pa.int32(), "tokens of each", dims="N", low=1)]

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        counted = int(np.asarray(self.response_num_tokens_N, np.int64).sum())
        if counted != len(self.token_logprobs_A) or not counted:
            raise ValueError(
                f"sample {self.sample_id}: {len(self.token_logprobs_A)} scores, "
                f"responses of {counted} tokens"
            )

    @property
    def num_tokens(self) -> int:
        """Response tokens scored."""
        return len(self.token_logprobs_A)

    @property
    def num_positions(self) -> int:
        """Scores of the row."""
        return len(self.token_logprobs_A)


RESPONSE_TOKEN_LOGPROBS = Table(ResponseTokenLogprobs, name="response_token_logprobs", version=1)
