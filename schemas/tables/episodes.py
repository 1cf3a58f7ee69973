"""Table ``episodes``: demonstrations, a query and its answer as token ids, with every span exact.

A row is ``prefix + demonstration_1 + .. + demonstration_M + query + answer``, where a demonstration
carries the separator that follows it. All parts were tokenised apart, so dropping demonstrations
moves no token of what is left, and the answer's tokens are the same in every subset. The prefix is
the tokenizer's own beginning of a text (a BOS token, or nothing).

Candidates are the answers to choose from, tokenised as the answer is; token ids of all of them lie
end to end in ``candidate_ids_C``. A generation episode has none, and ``gold`` -1.

Dimensions: T = tokens of the row, M = demonstrations, N = candidates, C = tokens of all candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..sample_id import sample_id_of
from ..table import TOKEN_ID, Column, Table
from .documents import SPLITS

Array = npt.NDArray[Any]
TASK_KINDS: Final = ("classification", "multiple_choice", "generation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One few-shot sample, exactly as the teacher and the student will see it."""

    sample_id: Annotated[str, Column(pa.string(), "hash of all token ids and spans of the row")]
    split: Annotated[str, Column(pa.string(), "train or heldout")]
    task: Annotated[str, Column(pa.string(), "name of the task")]
    kind: Annotated[str, Column(pa.string(), "classification, multiple_choice or generation")]
    query_id: Annotated[str, Column(pa.string(), "equal for all draws of one query's episodes")]
    draw: Annotated[
        int, Column(pa.int32(), "which draw of demonstrations for this query, from 0", low=0)
    ]
    input_ids_T: Annotated[Array, Column(TOKEN_ID, "token ids, the answer last", dims="T")]
    demonstrations_M3: Annotated[
        Array, Column(pa.int32(), "start, start of its answer, end of its answer", dims="M3")
    ]
    query_start: Annotated[int, Column(pa.int32(), "index of the query's first token")]
    answer_start: Annotated[int, Column(pa.int32(), "index of the answer's first token")]
    candidate_ids_C: Annotated[Array, Column(TOKEN_ID, "tokens of all candidates", dims="C")]
    candidate_lengths_N: Annotated[Array, Column(pa.int32(), "tokens of each", dims="N")]
    gold: Annotated[int, Column(pa.int32(), "index of the right candidate, -1 without candidates")]

    def __post_init__(self) -> None:
        """Check what every reader relies on; raises ValueError naming the sample."""
        num_tokens = len(self.input_ids_T)
        spans = self.demonstrations_M3
        marks = [*np.asarray(spans, np.int64).reshape(-1), self.query_start, self.answer_start]
        in_order = all(a <= b for a, b in zip(marks, [*marks[1:], num_tokens], strict=True))
        lengths = np.asarray(self.candidate_lengths_N, np.int64)
        problem = ""
        if self.split not in SPLITS or self.kind not in TASK_KINDS:
            problem = f"split '{self.split}' or kind '{self.kind}' is unknown"
        elif not in_order or not 0 < self.answer_start < num_tokens:
            problem = f"spans {marks} do not lie in order within {num_tokens} tokens"
        elif (lengths < 1).any() or int(lengths.sum()) != len(self.candidate_ids_C):
            problem = f"candidate lengths {lengths.tolist()} for {len(self.candidate_ids_C)} tokens"
        elif not -1 <= self.gold < max(len(lengths), 0) or (self.gold < 0) != (not len(lengths)):
            problem = f"gold is {self.gold} of {len(lengths)} candidates"
        if problem:
            raise ValueError(f"sample {self.sample_id}: {problem}")

    @property
    def hashed_id(self) -> str:
        """The ``sample_id`` that these token ids and spans have, candidates' after the row's."""
        num_tokens = len(self.input_ids_T)
        spans = [(int(a), int(b)) for row in self.demonstrations_M3 for a, b in pairwise(row)]
        spans += pairwise([int(self.query_start), int(self.answer_start), num_tokens])
        lengths = map(int, self.candidate_lengths_N)
        spans += pairwise(accumulate(lengths, initial=num_tokens))
        return sample_id_of(np.concatenate([self.input_ids_T, self.candidate_ids_C]), spans)

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.input_ids_T)

    @property
    def num_positions(self) -> int:
        """Episodes hold no scores."""
        return 0


EPISODES = Table(Episode, name="episodes", version=1)


def subset_input_ids(
    input_ids_T: Array, demonstrations_M3: Array, query_start: int, kept: Sequence[int]
) -> Array:
    """Return the row with only the demonstrations ``kept``, in the order given; [T'] ids.

    The answer keeps its tokens and its place at the end.
    """
    starts = [*(int(start) for start in demonstrations_M3[:, 0]), query_start]
    parts = [input_ids_T[: starts[0]], *(input_ids_T[starts[m] : starts[m + 1]] for m in kept)]
    return np.concatenate([*parts, input_ids_T[query_start:]])


def split_candidates(candidate_ids_C: Array, candidate_lengths_N: Array) -> list[Array]:
    """Return the token ids of each candidate."""
    ends = np.cumsum(np.asarray(candidate_lengths_N, np.int64))
    return np.split(candidate_ids_C, ends[:-1]) if len(ends) else []
