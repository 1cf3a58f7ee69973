"""The work of ``response_logprobs``: prompts run once, and the sum of log p over each response.

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
from stages.models.engines.engine import Engine, open_model
from stages.models.spec import EngineOptions
from stages.signals.response_logprobs.stage import ResponseLogprobsStage
from stages.signals.scoring.logits import logprobs_of
from stages.signals.scoring.responses import Prompted, prompted_of, response_states, sums_of
from stages.stage import Rejected, StageContext, Work

F64Array = npt.NDArray[np.float64]


@contextmanager
def open_work(stage: ResponseLogprobsStage, context: StageContext) -> Iterator[Work]:
    """Start the engine of ``stage.model``; the work scores one shard of pairs or responses."""
    model = context.models[stage.model]
    with open_model(model, context.engine, share_prefixes=True) as engine:
        context.notes["head_check"] = engine.head_check

        def work(shard: pa.Table) -> Iterable[ResponseLogprobs | Rejected]:
            return score_responses(engine, prompted_of(shard), context.engine)

        yield work


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
