"""What an audit asks of a live model about rows of ``response_logprobs``: the sums, made again."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from stages.signals.response_logprobs.stage import ResponseLogprobsStage
from stages.signals.response_logprobs.work import open_work
from stages.signals.scoring.agreement import SUMS, Ask, Measure, Question, remade
from stages.signals.scoring.responses import prompted_of
from stages.stage import StageContext

_CLOSE = {"response_logprobs_N": "response_logprobs_N"}


def measures(stage: ResponseLogprobsStage) -> dict[str, Measure]:
    """Return what is compared: one number a response."""
    return {"response_logprobs_N": Measure("nats", "log-prob of a response", SUMS)}


def questions(
    stage: ResponseLogprobsStage, context: StageContext, rows: pa.Table, most: int | None
) -> list[Question]:
    """Return what to ask about some rows: all of each, as sums are of whole responses."""
    asked = []
    for at, row in enumerate(prompted_of(rows)):
        num_read = len(row.prompt_T) + sum(row.counts)
        places_N = np.arange(len(row.responses))
        asked.append(Question(row.sample_id, rows.slice(at, 1), num_read, places_N))
    return asked


@contextmanager
def open_live(stage: ResponseLogprobsStage, context: StageContext) -> Iterator[Ask]:
    """Open the stage's own work for single rows."""
    with open_work(stage, context) as work:
        yield remade(work, ("response_num_tokens_N",), _CLOSE)
