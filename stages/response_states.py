"""A model's final states at every token of responses, each after its prompt, or why there are none.

Token j of a response is predicted at index ``len(prompt) - 1 + j``, so a response of A tokens needs
the last A states of prompt + response without its last token.

Dimensions: A = tokens of all responses of a row, end to end, D = hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.engines.engine import Engine
from stages.engines.options import EngineOptions
from stages.engines.sequences import require_room
from stages.prompted import Prompted


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

    Raises ConfigError where only ``options.max_model_len`` keeps a row out.
    """
    reasons = [_reason(engine, row) for row in rows]
    if engine.max_length == options.max_model_len:
        require_room(max((row.longest for row in rows), default=0), engine.max_length)
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
