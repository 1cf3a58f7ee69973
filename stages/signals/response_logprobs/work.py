"""The work of ``response_logprobs``: prompts run once, log p of each token or its sums.

A response of A tokens needs the last A states of prompt + response without its last token: token j
is predicted at index ``len(prompt) - 1 + j``. A stop token is a position like any other.

Dimensions: A = tokens of all responses of a row, end to end, N = its responses, D = hidden width.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.tables.response_logprobs import ResponseLogprobs
from schemas.tables.response_token_logprobs import ResponseTokenLogprobs
from stages.models.engines.engine import Engine, open_model
from stages.models.spec import EngineOptions
from stages.signals.response_logprobs.stage import ResponseLogprobsStage
from stages.signals.scoring.logits import logprobs_of
from stages.signals.scoring.responses import Prompted, prompted_of, response_states, sums_of
from stages.stage import Rejected, StageContext, Work

F64Array = npt.NDArray[np.float64]
Scored = ResponseLogprobs | ResponseTokenLogprobs


@contextmanager
def open_work(stage: ResponseLogprobsStage, context: StageContext) -> Iterator[Work]:
    """Start the engine of ``stage.model``; the work scores one shard of pairs or responses."""
    model = context.models[stage.model]
    with open_model(model, context.engine, share_prefixes=True) as engine:
        context.notes["head_check"] = engine.head_check

        def work(shard: pa.Table) -> Iterable[Scored | Rejected]:
            rows = prompted_of(shard)
            return score_responses(engine, rows, context.engine, per_token=stage.per_token)

        yield work


def score_responses(
    engine: Engine, rows: Sequence[Prompted], options: EngineOptions, *, per_token: bool = False
) -> Iterator[Scored | Rejected]:
    """Yield one row, or one rejection, for each prompt, in order."""
    states = response_states(engine, rows, options)
    for row, hidden_AD, reason in zip(rows, states.hidden_AD, states.reasons, strict=True):
        if hidden_AD is None:
            yield Rejected(row.sample_id, reason)
            continue
        places_A = np.arange(len(hidden_AD))
        logprobs_A = logprobs_of(engine.head, hidden_AD, places_A, row.token_ids_A)
        if not np.isfinite(logprobs_A).all():
            yield Rejected(row.sample_id, "non-finite logits")
            continue
        yield _row(row, logprobs_A, per_token)


def _row(row: Prompted, logprobs_A: F64Array, per_token: bool) -> Scored:
    counts_N = np.array(row.counts, np.int32)
    if per_token:
        return ResponseTokenLogprobs(
            sample_id=row.sample_id,
            token_logprobs_A=logprobs_A.astype(np.float32),
            response_num_tokens_N=counts_N,
        )
    return ResponseLogprobs(
        sample_id=row.sample_id,
        response_logprobs_N=sums_of(row, logprobs_A).astype(np.float32),
        response_num_tokens_N=counts_N,
    )
