"""Table ``subset_preferences``: how much subsets of an episode's demonstrations help the teacher.

``log Q(R) = sum of log p(answer token | R, query, answer tokens before)`` for each subset R
(BiAlign, arXiv 2312.17055, section 3.2), with no normalisation by length or over subsets. The text
of a subset is ``subset_input_ids`` of the episode and the indices kept here.

Dimensions: N = subsets, S = demonstrations of all subsets together.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..table import MOST_LOGPROB, Column, Table

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetPreferences:
    """Scores of one episode's subsets."""

    sample_id: Annotated[str, Column(pa.string(), "joins episodes.sample_id")]
    subset_demonstrations_S: Annotated[
        Array,
        Column(pa.int32(), "indices of the demonstrations kept, subset by subset", dims="S", low=0),
    ]
    subset_sizes_N: Annotated[Array, Column(pa.int32(), "demonstrations of each", dims="N", low=0)]
    answer_logprobs_N: Annotated[
        Array,
        Column(
            pa.float32(), "teacher's log Q of each subset", dims="N", unit="nats", high=MOST_LOGPROB
        ),
    ]
    num_answer_tokens: Annotated[
        int, Column(pa.int32(), "tokens of the answer, in every subset", low=1)
    ]
    ranks_N: Annotated[
        Array,
        Column(pa.int32(), "1 is the best; ties share the smallest of theirs", dims="N", low=1),
    ]

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        num_subsets = len(self.subset_sizes_N)
        if num_subsets < 2 or {len(self.answer_logprobs_N), len(self.ranks_N)} != {num_subsets}:
            raise ValueError(f"sample {self.sample_id}: {num_subsets} subsets, at least 2 expected")
        if int(np.asarray(self.subset_sizes_N).sum()) != len(self.subset_demonstrations_S):
            raise ValueError(f"sample {self.sample_id}: subset sizes do not match their indices")
        ranked_N = np.asarray(self.ranks_N)[np.argsort(-np.asarray(self.answer_logprobs_N))]
        if (np.diff(ranked_N) < 0).any() or (ranked_N > np.arange(1, num_subsets + 1)).any():
            raise ValueError(f"sample {self.sample_id}: ranks are not those of the scores")

    @property
    def num_tokens(self) -> int:
        """Answer tokens scored, over all subsets."""
        return self.num_answer_tokens * len(self.subset_sizes_N)

    @property
    def num_positions(self) -> int:
        """Scores of the row."""
        return len(self.subset_sizes_N)


SUBSET_PREFERENCES = Table(SubsetPreferences, name="subset_preferences", version=1)


def split_subsets(subset_demonstrations_S: Array, subset_sizes_N: Array) -> list[list[int]]:
    """Return the demonstrations of each subset."""
    ends = np.cumsum(np.asarray(subset_sizes_N, np.int64))
    return [part.tolist() for part in np.split(subset_demonstrations_S, ends[:-1])]
