"""Table ``preference_pairs``: a prompt and two responses to it, the better one first named.

Prompt and responses are token ids as the models see them: the prompt ends with the header that
opens the assistant's turn, but for spaces at its end, which the responses begin with; a finished
response ends with the token that closes it, and that token is a position like any other. All three
were tokenised apart, so a response has the same tokens whatever is done to its prompt.

Dimensions: T = tokens of the prompt, C = of the chosen response, R = of the rejected one.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..sample_id import sample_id_of
from ..table import TOKEN_ID, Column, Table
from .documents import SPLITS

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """One prompt with a chosen and a rejected response."""

    sample_id: Annotated[str, Column(pa.string(), "hash of all token ids and spans of the row")]
    split: Annotated[str, Column(pa.string(), "train or heldout, by content hash of the prompt")]
    prompt_ids_T: Annotated[Array, Column(TOKEN_ID, "up to where a response begins", dims="T")]
    chosen_ids_C: Annotated[Array, Column(TOKEN_ID, "end-of-turn token included", dims="C")]
    rejected_ids_R: Annotated[Array, Column(TOKEN_ID, "end-of-turn token included", dims="R")]
    chosen_finished: Annotated[bool, Column(pa.bool_(), "false: cut, and no end-of-turn token")]
    rejected_finished: Annotated[bool, Column(pa.bool_(), "false: cut, and no end-of-turn token")]

    def __post_init__(self) -> None:
        """Check what every reader relies on; raises ValueError naming the sample."""
        lengths = len(self.prompt_ids_T), len(self.chosen_ids_C), len(self.rejected_ids_R)
        if self.split not in SPLITS:
            raise ValueError(f"sample {self.sample_id}: split '{self.split}' is none of {SPLITS}")
        if min(lengths) < 1:
            raise ValueError(
                f"sample {self.sample_id}: prompt, chosen and rejected have {lengths} tokens, "
                f"each needs one at least"
            )

    @property
    def hashed_id(self) -> str:
        """The ``sample_id`` that these token ids and their parts have."""
        parts = (self.prompt_ids_T, self.chosen_ids_C, self.rejected_ids_R)
        ends = accumulate(map(len, parts), initial=0)
        return sample_id_of(np.concatenate(parts), pairwise(ends))

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of both responses."""
        return len(self.prompt_ids_T) + len(self.chosen_ids_C) + len(self.rejected_ids_R)

    @property
    def num_positions(self) -> int:
        """Pairs hold no scores."""
        return 0


PREFERENCE_PAIRS = Table(PreferencePair, name="preference_pairs", version=1)
