"""Table ``token_entropies``: how unsure a model is at each scored position of a row.

Entry j is the entropy of the model's distribution over the row's j-th scored token given all tokens
before it: of every token but the first, or of those that the row names (``schemas.scored_spans``).
The distribution is the raw one, as in ``teacher_logits``, whose entries are at the same positions.

Dimensions: P = scored positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy.typing as npt
import pyarrow as pa

from ..table import LOG_VOCABULARY, Column, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEntropies:
    """One row of an input, by its key."""

    sample_id: Annotated[str, Column(pa.string(), "joins the input's sample_id")]
    token_entropies_P: Annotated[
        npt.NDArray[Any],
        Column(
            *(pa.float16(), "entropy of the model, of the full distribution"),
            dims="P",
            unit="nats",
            low=0,
            high=LOG_VOCABULARY,
        ),
    ]

    def __post_init__(self) -> None:
        """Check that there is a position; raises ValueError naming the sample."""
        if not len(self.token_entropies_P):
            raise ValueError(f"sample {self.sample_id}: no position has an entropy")

    @staticmethod
    def surely_sound(columns: Mapping[str, Sequence[Any]]) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` asks for."""
        return all(map(len, columns["token_entropies_P"]))

    @property
    def num_tokens(self) -> int:
        """Scored tokens of the row."""
        return len(self.token_entropies_P)

    @property
    def num_positions(self) -> int:
        """Scored positions of the row."""
        return len(self.token_entropies_P)


TOKEN_ENTROPIES = Table(TokenEntropies, name="token_entropies", version=1)
