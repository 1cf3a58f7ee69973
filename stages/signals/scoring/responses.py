"""Prompts with their responses, a model's final states at each of their tokens, sums over them.

Token j of a response is predicted at index ``len(prompt) - 1 + j`` of prompt + response, so the
last token of a response is fed to nobody, and the states that count are the last ones of what is.

Dimensions: T = tokens of a prompt, A = tokens of all responses to it, end to end, N = responses,
D = hidden width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from schemas.tables.episodes import split_candidates
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.prompted.responses import RESPONSES
from stages.models.engines.engine import Engine
from stages.models.engines.sequences import TokenIds, require_room
from stages.models.spec import EngineOptions

F64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prompted:
    """One prompt and the responses to it; of a preference pair the chosen one first."""

    sample_id: str
    prompt_T: TokenIds
    responses: list[TokenIds]

    @property
    def sequences(self) -> list[TokenIds]:
        """What is fed for each response; its last ``counts[i]`` states predict the response."""
        return [np.concatenate([self.prompt_T, response[:-1]]) for response in self.responses]

    @property
    def counts(self) -> list[int]:
        """Tokens of each response."""
        return [len(response) for response in self.responses]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence fed."""
        return len(self.prompt_T) + max(self.counts) - 1

    @property
    def token_ids_A(self) -> TokenIds:
        """All responses end to end."""
        return np.concatenate(self.responses)


def prompted_of(shard: pa.Table) -> list[Prompted]:
    """Return the rows of a shard of ``preference_pairs`` or ``responses``, in order."""
    read = _pairs if "chosen_ids_C" in shard.schema.names else _responses
    return [row for batch in shard.to_batches() for row in read(batch)]


def _pairs(batch: pa.RecordBatch) -> Iterator[Prompted]:
    for pair in PREFERENCE_PAIRS.rows(batch):
        yield Prompted(pair.sample_id, pair.prompt_ids_T, [pair.chosen_ids_C, pair.rejected_ids_R])


def _responses(batch: pa.RecordBatch) -> Iterator[Prompted]:
    for row in RESPONSES.rows(batch):
        responses = split_candidates(row.response_ids_A, row.response_lengths_N)
        yield Prompted(row.sample_id, row.prompt_ids_T, responses)


@dataclass(frozen=True, slots=True)
class ResponseStates:
    """What a model makes of rows: states [A, D] of each, or why it was not run.

    The states are in ordinary memory: they outlive the engine.
    """

    hidden_AD: list[Tensor | None]
    reasons: list[str]


def response_states(
    engine: Engine, rows: Sequence[Prompted], options: EngineOptions
) -> ResponseStates:
    """Run the rows that the model can take, as one unit and in an order of the engine's own.

    Raises ConfigError where only ``options`` keep a row out.
    """
    reasons = [_reason(engine, row) for row in rows]
    require_room(engine, max((row.longest for row in rows), default=0), options)
    fitting = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    states = iter(
        engine.last_hidden_states(
            [sequence for row in fitting for sequence in row.sequences],
            [count for row in fitting for count in row.counts],
        )
    )
    hidden = [
        None if reason else torch.cat([next(states) for _ in row.responses]).cpu()
        for row, reason in zip(rows, reasons, strict=True)
    ]
    return ResponseStates(hidden, reasons)


def _reason(engine: Engine, row: Prompted) -> str:
    """Say why a model cannot take a row, ``""`` if it can."""
    vocab_size = engine.head.vocab_size
    largest = max(int(row.prompt_T.max()), int(row.token_ids_A.max()))
    if largest >= vocab_size:
        return f"token id {largest} outside the teacher's vocabulary of {vocab_size}"
    if row.longest > engine.max_length:
        return f"longer than the model's window of {engine.max_length} tokens"
    return ""


def sums_of(row: Prompted, values_A: F64Array) -> F64Array:
    """Return the sum [N] over the tokens of each response."""
    return np.asarray(np.add.reduceat(values_A, np.cumsum([0, *row.counts[:-1]])))
