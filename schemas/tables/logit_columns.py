"""Columns and checks that rows of ``teacher_logits`` have in every encoding.

Dimensions: P = scored positions.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy.typing as npt
import pyarrow as pa

from ..table import LOG_VOCABULARY, MOST_LOGPROB, Column

Array = npt.NDArray[Any]
Columns = Mapping[str, Sequence[Any]]
SampleId = Annotated[str, Column(pa.string(), "joins documents.sample_id")]
FirstTarget = Annotated[int, Column(pa.int32(), "index in input_ids of the token entry 0 predicts")]
NextTokenLogprobs = Annotated[
    Array,
    Column(pa.float16(), "log p(actual next token)", dims="P", unit="nats", high=MOST_LOGPROB),
]
Entropies = Annotated[
    Array,
    Column(
        pa.float16(), "entropy of the teacher", dims="P", unit="nats", low=0, high=LOG_VOCABULARY
    ),
]

NextTokenLogprobsIfKnown = Annotated[
    Array,
    Column(
        *(pa.float16(), "log p(actual next token)"),
        dims="P",
        unit="nats",
        high=MOST_LOGPROB,
        unknown=True,
    ),
]
EntropiesIfKnown = Annotated[
    Array,
    Column(
        *(pa.float16(), "entropy of the teacher"),
        dims="P",
        unit="nats",
        low=0,
        high=LOG_VOCABULARY,
        unknown=True,
    ),
]


class ScoredPositions:
    """What every encoding's row can count."""

    __slots__ = ()
    sample_id: str
    first_target: int
    next_token_logprobs_P: Array
    entropies_P: Array

    @property
    def num_positions(self) -> int:
        """Scored positions of the row."""
        return len(self.next_token_logprobs_P)

    @property
    def num_tokens(self) -> int:
        """Tokens up to and including the last one scored; between spans, none are counted."""
        return self.first_target + self.num_positions


def check_positions(row: ScoredPositions, *lengths: int) -> None:
    """Raise ValueError naming the sample unless each of these lengths is that of its columns."""
    expected = len(row.next_token_logprobs_P)
    found = {*lengths, len(row.entropies_P)}
    if found != {expected} or row.first_target < 1:
        raise ValueError(
            f"sample {row.sample_id}: {expected} next-token log-probs beside "
            f"{sorted(found)} entries, first_target {row.first_target}"
        )


def positions_agree(columns: Columns, *names: str) -> bool:
    """Whether every row of a record batch has positions, as many in each of these columns."""
    expected = [*map(len, columns["next_token_logprobs_P"])]
    return (
        all([*map(len, columns[name])] == expected for name in (*names, "entropies_P"))
        and min(expected, default=0) > 0
        and min(columns["first_target"]) >= 1
    )
