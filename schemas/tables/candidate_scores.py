"""Table ``candidate_scores``: the teacher's log-prob of each candidate answer of an episode.

Sums and token counts are both kept, so that a trainer may choose ``sum`` or ``mean`` scoring:
In-context Learning Distillation (arXiv 2212.10670) normalises P(candidate) over the candidates, and
does not say which for answers of several tokens.

Dimensions: N = candidates, in the order of the episode's.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy.typing as npt
import pyarrow as pa

from ..table import MOST_LOGPROB, Column, Table

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScores:
    """Scores of one episode's candidates."""

    sample_id: Annotated[str, Column(pa.string(), "joins episodes.sample_id")]
    candidate_logprobs_N: Annotated[
        Array,
        Column(
            pa.float32(),
            "sum of log p over each candidate's tokens",
            dims="N",
            unit="nats",
            high=MOST_LOGPROB,
        ),
    ]
    candidate_num_tokens_N: Annotated[Array, Column(pa.int32(), "tokens of each", dims="N", low=1)]

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        counts = len(self.candidate_logprobs_N), len(self.candidate_num_tokens_N)
        if counts[0] != counts[1] or not counts[0]:
            raise ValueError(f"sample {self.sample_id}: {counts[0]} scores, {counts[1]} counts")

    @property
    def num_tokens(self) -> int:
        """Candidate tokens scored."""
        return int(self.candidate_num_tokens_N.sum())

    @property
    def num_positions(self) -> int:
        """Scores of the row."""
        return len(self.candidate_logprobs_N)


CANDIDATE_SCORES = Table(CandidateScores, name="candidate_scores", version=1)
