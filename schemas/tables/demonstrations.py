"""Table ``demonstrations``: a query, and what the teacher and a distiller read before it.

MEND (arXiv 2403.06914): a distiller reads demonstrations and makes vectors of them, and a frozen
reader answers the query after the vectors as the teacher does after the demonstrations themselves.
Both may have a budget of tokens, so a row holds what each of them sees: ``input_ids_T`` is
``teacher's demonstrations + query + answer``, ``distiller_ids_L`` the distiller's demonstrations.
The query is there once, so the reader's cannot be another than the teacher's. The demonstrations
of both begin alike, so ``demonstration_ends_M`` is about either.

The query's own tokens and the answer's are scored, each from the tokens before it; the first token
of the query is not, as it follows a demonstration for the one and a vector for the other.

A row made of a document has no answer (``answer_start`` is its length) and no task; candidates are
those of the episode, and are there for who evaluates.

Dimensions: T = tokens as the teacher reads them, L = the distiller's tokens, S = scored spans,
M = demonstrations that the one reads that reads more, N = candidates, C = tokens of all candidates.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..sample_id import id_spans, is_sample_id, sample_id_of
from ..scored_spans import span_problem, span_targets
from ..table import TOKEN_ID, Column, Table
from .documents import SPLITS
from .episodes import TASK_KINDS

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstrated:
    """One query with the demonstrations that the teacher and a distiller read."""

    sample_id: Annotated[str, Column(pa.string(), "hash of all token ids, spans and the source's")]
    split: Annotated[str, Column(pa.string(), "train or heldout")]
    source_id: Annotated[str, Column(pa.string(), "sample_id of the document or episode")]
    task: Annotated[str, Column(pa.string(), "name of the task, empty for a document")]
    kind: Annotated[str, Column(pa.string(), "the episode's kind, empty for a document")]
    query_id: Annotated[str, Column(pa.string(), "equal for all draws of one query")]
    draw: Annotated[
        int, Column(pa.int32(), "which draw of demonstrations for this query, from 0", low=0)
    ]
    input_ids_T: Annotated[Array, Column(TOKEN_ID, "what the teacher reads", dims="T")]
    scored_S2: Annotated[
        Array, Column(pa.int32(), "start and end of the tokens that are scored", dims="S2")
    ]
    query_start: Annotated[int, Column(pa.int32(), "index of the query's first token")]
    answer_start: Annotated[int, Column(pa.int32(), "index of the answer's first token")]
    distiller_ids_L: Annotated[
        Array, Column(TOKEN_ID, "the demonstrations that a distiller reads", dims="L")
    ]
    demonstration_ends_M: Annotated[
        Array, Column(pa.int32(), "tokens up to the end of each that either reads", dims="M", low=1)
    ]
    num_demonstrations: Annotated[int, Column(pa.int32(), "of the source's row")]
    num_teacher_demonstrations: Annotated[int, Column(pa.int32(), "that the teacher reads")]
    num_distiller_demonstrations: Annotated[int, Column(pa.int32(), "that a distiller reads")]
    candidate_ids_C: Annotated[Array, Column(TOKEN_ID, "tokens of all candidates", dims="C")]
    candidate_lengths_N: Annotated[Array, Column(pa.int32(), "tokens of each", dims="N")]
    gold: Annotated[int, Column(pa.int32(), "index of the right candidate, -1 without candidates")]

    def __post_init__(self) -> None:
        """Check what every reader relies on; raises ValueError naming the sample."""
        num_tokens = len(self.input_ids_T)
        seen = self.num_teacher_demonstrations, self.num_distiller_demonstrations
        lengths = np.asarray(self.candidate_lengths_N, np.int64)
        problem = span_problem(self.scored_S2, num_tokens)
        if self.split not in SPLITS or self.kind not in ("", *TASK_KINDS):
            problem = f"split '{self.split}' or kind '{self.kind}' is unknown"
        elif not is_sample_id(self.source_id):
            problem = f"source_id '{self.source_id}' is no sample_id"
        elif not 0 < self.query_start < self.answer_start <= num_tokens:
            problem = (
                f"query {self.query_start}, answer {self.answer_start} do not lie in order in "
                f"{num_tokens} tokens"
            )
        elif not problem and int(np.min(self.scored_S2)) <= self.query_start:
            problem = f"spans {self.scored_S2.tolist()} begin before the query's second token"
        elif not len(self.distiller_ids_L) or not 0 < min(seen) <= max(seen):
            problem = f"teacher and distiller see {seen} demonstrations, one each is the least"
        elif max(seen) > self.num_demonstrations:
            problem = f"{seen} demonstrations are seen of {self.num_demonstrations}"
        elif not _end_where_they_are_read(self):
            problem = (
                f"demonstrations end at {np.asarray(self.demonstration_ends_M).tolist()}, and "
                f"{seen} of them in {self.query_start} and {len(self.distiller_ids_L)} tokens"
            )
        elif (lengths < 1).any() or int(lengths.sum()) != len(self.candidate_ids_C):
            problem = f"candidate lengths {lengths.tolist()} for {len(self.candidate_ids_C)} tokens"
        elif not -1 <= self.gold < len(lengths) or (self.gold < 0) != (not len(lengths)):
            problem = f"gold is {self.gold} of {len(lengths)} candidates"
        if problem:
            raise ValueError(f"sample {self.sample_id}: {problem}")

    @property
    def hashed_id(self) -> str:
        """The ``sample_id`` of all token ids end to end, all spans and the source's sample_id."""
        num_tokens = len(self.input_ids_T)
        ends = np.cumsum(self.candidate_lengths_N, dtype=np.int64).tolist()
        spans = [(int(self.query_start), int(self.answer_start))]
        spans += [(int(start), int(end)) for start, end in self.scored_S2]
        spans += pairwise([num_tokens, *(num_tokens + end for end in ends)])
        spans += pairwise([0, *np.asarray(self.demonstration_ends_M).tolist()])
        spans += id_spans(self.source_id)
        ids = np.concatenate([self.input_ids_T, self.candidate_ids_C, self.distiller_ids_L])
        return sample_id_of(ids, spans)

    @property
    def num_tokens(self) -> int:
        """Tokens that the teacher reads."""
        return len(self.input_ids_T)

    @property
    def num_positions(self) -> int:
        """Tokens to be scored."""
        return len(span_targets(self.scored_S2))


def _end_where_they_are_read(row: Demonstrated) -> bool:
    """Whether each demonstration ends after the one before, the last one where it is cut."""
    ends_M = np.asarray(row.demonstration_ends_M, np.int64)
    seen = row.num_teacher_demonstrations, row.num_distiller_demonstrations
    if len(ends_M) != max(seen) or (np.diff(ends_M, prepend=0) < 1).any():
        return False
    read = row.query_start, len(row.distiller_ids_L)
    return all(ends_M[count - 1] == length for count, length in zip(seen, read, strict=True))


DEMONSTRATIONS = Table(Demonstrated, name="demonstrations", version=2)
