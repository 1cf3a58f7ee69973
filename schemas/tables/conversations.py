"""Table ``conversations``: a chat as token ids, and which of them an assistant said.

The ids are what a model reads and writes: the text of the chat template, with each scored part
tokenised apart from what stands before it, as it is when a model begins to answer there. A scored
part ends with the token that closes the turn; a row that was cut may end without one. A row with
no scored part is a prompt: it ends with what opens the assistant's turn.

Dimensions: T = tokens of the row, S = scored spans.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy.typing as npt
import pyarrow as pa

from ..sample_id import is_sample_id, sample_id_of_part
from ..scored_spans import span_problem, span_targets
from ..table import TOKEN_ID, Column, Table
from .documents import SPLITS

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One conversation, or the part of one that is read and answered together."""

    sample_id: Annotated[str, Column(pa.string(), "hash of all token ids, spans and the source's")]
    split: Annotated[str, Column(pa.string(), "train or heldout, by content hash of the opening")]
    source_id: Annotated[
        str, Column(pa.string(), "sample_id of the prompt that was answered, empty for a chat read")
    ]
    input_ids_T: Annotated[Array, Column(TOKEN_ID, "token ids", dims="T")]
    scored_S2: Annotated[
        Array, Column(pa.int32(), "start and end of the tokens that are scored", dims="S2")
    ]
    is_cut: Annotated[bool, Column(pa.bool_(), "true: its end was cut to a length")]

    def __post_init__(self) -> None:
        """Check what every reader relies on; raises ValueError naming the sample."""
        problem = ""
        if len(self.scored_S2):
            problem = span_problem(self.scored_S2, len(self.input_ids_T))
        if not len(self.input_ids_T):
            problem = "it has no token"
        elif self.source_id and not is_sample_id(self.source_id):
            problem = f"source_id '{self.source_id}' is no sample_id"
        elif self.split not in SPLITS:
            problem = f"split '{self.split}' is none of {SPLITS}"
        if problem:
            raise ValueError(f"sample {self.sample_id}: {problem}")

    @property
    def hashed_id(self) -> str:
        """The ``sample_id`` of these token ids and spans, and of the source's key, if any."""
        return sample_id_of_part(self.input_ids_T, self.scored_S2, self.source_id)

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.input_ids_T)

    @property
    def num_positions(self) -> int:
        """Tokens to be scored."""
        return len(span_targets(self.scored_S2))


CONVERSATIONS = Table(Conversation, name="conversations", version=1)
