"""What an audit asks of a live model about rows of ``response_logprobs``: scores, made again."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from stages.signals.response_logprobs.stage import ResponseLogprobsStage
from stages.signals.response_logprobs.work import open_work
from stages.signals.scoring.agreement import NATS, SUMS, Ask, Measure, Question, remade
from stages.signals.scoring.responses import prompted_of
from stages.stage import StageContext

_SUMS, _TOKENS = "response_logprobs_N", "token_logprobs_A"


def measures(stage: ResponseLogprobsStage) -> dict[str, Measure]:
    """Return what is compared: one number a response, or one a token."""
    if stage.per_token:
        return {_TOKENS: Measure("nats", "log-prob of a token", NATS)}
    return {_SUMS: Measure("nats", "log-prob of a response", SUMS)}


def questions(
    stage: ResponseLogprobsStage, context: StageContext, rows: pa.Table, most: int | None
) -> list[Question]:
    """Return what to ask about some rows: all of each."""
    asked = []
    for at, row in enumerate(prompted_of(rows)):
        num_read = len(row.prompt_T) + sum(row.counts)
        num_places = sum(row.counts) if stage.per_token else len(row.responses)
        places = np.arange(num_places)
        asked.append(Question(row.sample_id, rows.slice(at, 1), num_read, places))
    return asked


@contextmanager
def open_live(stage: ResponseLogprobsStage, context: StageContext) -> Iterator[Ask]:
    """Open the stage's own work for single rows."""
    with open_work(stage, context) as work:
        compared = _TOKENS if stage.per_token else _SUMS
        yield remade(work, ("response_num_tokens_N",), {compared: compared})
