"""Table ``span_masks``: which tokens of a row are to be trained at, as a user marked them.

Spans are half-open, ``[start, end)`` of indices in the row's token ids, as in
``schemas.scored_spans``; tokens of them that the row has scored are the ones that count.

Dimensions: S = spans.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy.typing as npt
import pyarrow as pa

from ..scored_spans import span_problem, span_targets
from ..table import Column, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanMask:
    """One row of an input, by its key."""

    sample_id: Annotated[str, Column(pa.string(), "joins the input's sample_id")]
    selected_S2: Annotated[
        npt.NDArray[Any],
        Column(pa.int32(), "start and end of the tokens that are trained at", dims="S2"),
    ]

    def __post_init__(self) -> None:
        """Check that spans are there and lie in order; raises ValueError naming the sample."""
        marks = self.selected_S2.reshape(-1).tolist()
        problem = "no span is selected"
        if marks:
            problem = span_problem(self.selected_S2, marks[-1])
        if problem:
            raise ValueError(f"sample {self.sample_id}: {problem}")

    @property
    def num_tokens(self) -> int:
        """Selected tokens of the row."""
        return len(span_targets(self.selected_S2))

    @property
    def num_positions(self) -> int:
        """Selected positions of the row."""
        return self.num_tokens


SPAN_MASKS = Table(SpanMask, name="span_masks", version=1)
