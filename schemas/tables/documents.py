"""Table ``documents``: running text as token ids, the input of plain token-level distillation.

Dimensions: T = tokens of the row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy.typing as npt
import pyarrow as pa

from ..sample_id import sample_id_of
from ..table import TOKEN_ID, Column, Table

SPLITS = ("train", "heldout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One sequence of token ids, exactly as the teacher and the student will see it."""

    sample_id: Annotated[str, Column(pa.string(), "hash of input_ids; joins every signal table")]
    split: Annotated[str, Column(pa.string(), "train or heldout, by content hash of the text")]
    input_ids_T: Annotated[npt.NDArray[Any], Column(TOKEN_ID, "token ids", dims="T")]

    def __post_init__(self) -> None:
        """Check what every reader relies on; raises ValueError naming the sample."""
        if self.split not in SPLITS:
            raise ValueError(
                f"sample {self.sample_id}: split is '{self.split}', not one of {SPLITS}"
            )
        if len(self.input_ids_T) < 2:
            raise ValueError(f"sample {self.sample_id}: {len(self.input_ids_T)} tokens, at least 2")

    @staticmethod
    def surely_sound(columns: Mapping[str, Sequence[Any]]) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` and their hash ask for."""
        ids = columns["input_ids_T"]
        return (
            set(columns["split"]) <= {*SPLITS}
            and all(len(ids_T) >= 2 for ids_T in ids)
            and [sample_id_of(ids_T) for ids_T in ids] == list(columns["sample_id"])
        )

    @property
    def hashed_id(self) -> str:
        """The ``sample_id`` that these token ids have."""
        return sample_id_of(self.input_ids_T)

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.input_ids_T)

    @property
    def num_positions(self) -> int:
        """Documents hold no scores."""
        return 0


DOCUMENTS = Table(Document, name="documents", version=1)
