"""The work of ``response_logprobs``: prompts run once, and the sum of log p over each response.

A response of A tokens needs the last A states of prompt + response without its last token: token j
is predicted at index ``len(prompt) - 1 + j``. A stop token is a position like any other.

Dimensions: A = tokens of all responses of a row, end to end, N = its responses, D = hidden width.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from schemas.response_logprobs import ResponseLogprobs
from stages.candidate_scoring import logprobs_of
from stages.engines.engine import Engine, open_engine
from stages.engines.options import EngineOptions
from stages.prompted import Prompted, prompted_of
from stages.response_logprobs import ResponseLogprobsStage
from stages.scoring import require_room
from stages.stage import Rejected, StageContext, Work

F64Array = npt.NDArray[np.float64]


@contextmanager
def opened_scorer(stage: ResponseLogprobsStage, context: StageContext) -> Iterator[Work]:
    """Start the engine of ``stage.model``; the work scores one shard of pairs or responses."""
    model = context.models[stage.model]
    with open_engine(
        model.engine,
        model.path,
        dtype=model.dtype,
        options=context.engine,
        share_prefixes=True,
    ) as engine:

        def work(shard: pa.Table) -> Iterable[ResponseLogprobs | Rejected]:
            return score_responses(engine, prompted_of(shard), context.engine)

        yield work


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


def score_responses(
    engine: Engine, rows: Sequence[Prompted], options: EngineOptions
) -> Iterator[ResponseLogprobs | Rejected]:
    """Yield one row, or one rejection, for each prompt, in order."""
    states = response_states(engine, rows, options)
    for row, hidden_AD, reason in zip(rows, states.hidden_AD, states.reasons, strict=True):
        if hidden_AD is None:
            yield Rejected(row.sample_id, reason)
            continue
        places_A = np.arange(len(hidden_AD))
        logprobs_A = logprobs_of(engine.head, hidden_AD, places_A, row.token_ids_A)
        sums_N = sums_of(row, logprobs_A)
        if not np.isfinite(sums_N).all():
            yield Rejected(row.sample_id, "non-finite logits")
            continue
        yield ResponseLogprobs(
            sample_id=row.sample_id,
            response_logprobs_N=sums_N.astype(np.float32),
            response_num_tokens_N=np.array(row.counts, np.int32),
        )


def sums_of(row: Prompted, values_A: F64Array) -> F64Array:
    """Return the sum [N] over the tokens of each response."""
    return np.asarray(np.add.reduceat(values_A, np.cumsum([0, *row.counts[:-1]])))
