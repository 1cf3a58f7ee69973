"""Table ``response_logprobs``: a model's log-prob of each response to a prompt, one number each.

Made of preference pairs (N = 2: chosen, rejected) it is the reference of DPO (arXiv 2305.18290,
equation 7); made with an aligned teacher and with its reference, the difference of two of these
tables times beta is the implicit reward (the same, equation 5, less what the prompt alone fixes).

Dimensions: N = responses to one prompt.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy.typing as npt
import pyarrow as pa

from ...table import MOST_LOGPROB, Column, Table

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseLogprobs:
    """Scores of one prompt's responses."""

    sample_id: Annotated[str, Column(pa.string(), "joins preference_pairs or responses.sample_id")]
    response_logprobs_N: Annotated[
        Array,
        Column(
            pa.float32(),
            "sum of log p over each response",
            dims="N",
            unit="nats",
            high=MOST_LOGPROB,
        ),
    ]
    response_num_tokens_N: Annotated[Array, Column(pa.int32(), "tokens of each", dims="N", low=1)]

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        counts = len(self.response_logprobs_N), len(self.response_num_tokens_N)
        if counts[0] != counts[1] or not counts[0]:
            raise ValueError(f"sample {self.sample_id}: {counts[0]} scores, {counts[1]} counts")

    @property
    def num_tokens(self) -> int:
        """Response tokens scored."""
        return int(self.response_num_tokens_N.sum())

    @property
    def num_positions(self) -> int:
        """Scores of the row."""
        return len(self.response_logprobs_N)


RESPONSE_LOGPROBS = Table(ResponseLogprobs, name="response_logprobs", version=1)
