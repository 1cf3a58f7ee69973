"""Table ``aligned_spans``: text in another tokenizer's ids, and a teacher's log-prob of its spans.

Two tokenisations of one text agree on some byte offsets. Between two of them that follow one
another lie whole tokens of both, however many of each: a span. The teacher's log-prob of a span is
the sum over its own tokens there; a student of the other tokenizer has one of the same bytes. A
special token of both, such as the end of a text, is a span of no bytes.

Variant ``entries`` adds what the teacher predicts where a span begins: its likeliest tokens, each
under the student's token that its bytes begin with.

Dimensions: T = tokens of the row, S = spans, E = entries of all spans end to end.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..ragged import id_twice
from ..sample_id import is_sample_id, sample_id_of_part
from ..scored_spans import span_problem, span_targets
from ..table import MOST_LOGPROB, TOKEN_ID, Column, Table
from .documents import SPLITS

Array = npt.NDArray[Any]
NAME = "aligned_spans"


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedSpans:
    """One text in the student's ids, and the spans that both tokenisations agree on."""

    sample_id: Annotated[str, Column(pa.string(), "hash of token ids, spans and the source's key")]
    split: Annotated[str, Column(pa.string(), "train or heldout, as the document is")]
    source_id: Annotated[str, Column(pa.string(), "sample_id of the document of this text")]
    input_ids_T: Annotated[Array, Column(TOKEN_ID, "ids of the student's tokenizer", dims="T")]
    scored_S2: Annotated[
        Array, Column(pa.int32(), "start and end of each span in those tokens", dims="S2")
    ]
    span_logprobs_S: Annotated[
        Array,
        Column(pa.float32(), "the teacher's log-prob of the span", dims="S", unit="nats", high=0.0),
    ]
    span_bytes_S: Annotated[
        Array, Column(pa.int32(), "bytes of the span; a special token has none", dims="S", low=0)
    ]
    num_bytes: Annotated[int, Column(pa.int32(), "bytes of the document's text", low=0)]

    def __post_init__(self) -> None:
        """Check what every reader relies on; raises ValueError naming the sample."""
        problem = span_problem(self.scored_S2, len(self.input_ids_T))
        lengths = {len(self.scored_S2), len(self.span_logprobs_S), len(self.span_bytes_S)}
        covered = int(self.span_bytes_S.sum(dtype=np.int64))
        if len(lengths) > 1:
            problem = f"its spans, their log-probs and bytes are {sorted(lengths)}"
        elif covered > self.num_bytes:
            problem = f"its spans hold {covered} bytes of {self.num_bytes}"
        elif not is_sample_id(self.source_id):
            problem = f"source_id '{self.source_id}' is no sample_id"
        elif self.split not in SPLITS:
            problem = f"split '{self.split}' is none of {SPLITS}"
        if problem:
            raise ValueError(f"sample {self.sample_id}: {problem}")

    @property
    def hashed_id(self) -> str:
        """The ``sample_id`` of these token ids and spans, and of the document's key."""
        return sample_id_of_part(self.input_ids_T, self.scored_S2, self.source_id)

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.input_ids_T)

    @property
    def num_positions(self) -> int:
        """Tokens in spans."""
        return len(span_targets(self.scored_S2))


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedEntries(AlignedSpans):
    """The same with the teacher's likeliest tokens where each span begins."""

    num_entries_S: Annotated[Array, Column(pa.uint8(), "entries of each span", dims="S")]
    entry_ids_E: Annotated[Array, Column(TOKEN_ID, "ids of the student's tokenizer", dims="E")]
    entry_logprobs_E: Annotated[
        Array,
        Column(
            *(pa.float16(), "the teacher's log-prob of tokens that begin with it"),
            dims="E",
            unit="nats",
            high=MOST_LOGPROB,
        ),
    ]

    def __post_init__(self) -> None:
        """Check entries, too; raises ValueError naming the sample."""
        AlignedSpans.__post_init__(self)
        lengths = len(self.num_entries_S), len(self.entry_ids_E), len(self.entry_logprobs_E)
        num_entries = int(self.num_entries_S.sum(dtype=np.int64))
        if lengths != (len(self.scored_S2), num_entries, num_entries):
            raise ValueError(f"sample {self.sample_id}: entries do not match their counts")
        if (twice := _id_twice(self.num_entries_S, self.entry_ids_E)) is not None:
            raise ValueError(f"sample {self.sample_id}: id {twice} is kept twice at one span")


def _id_twice(counts_S: Array, ids_E: Array) -> int | None:
    return id_twice(np.repeat(np.arange(len(counts_S)), counts_S), ids_E.astype(np.int64))


ALIGNED_SPANS = Table(AlignedSpans, name=NAME, version=1)
ALIGNED_ENTRIES = Table(AlignedEntries, name=NAME, version=1, variant="entries")
