"""A student's log-probs of episodes' candidates, and of their answers under subsets of the demos.

The same quantities that ``candidate_scores`` and ``subset_preferences`` hold of the teacher; no
gradient: call in inference mode. Subsets, and candidates of one token each, go through
``sequence_logprobs``, some episodes of similar length at a time; episodes with a candidate of
several tokens go one by one through ``shared_prompt``.

Dimensions: N = candidates or subsets of an episode.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from schemas.tables.episodes import split_candidates
from stages.models.causal_lm.sequence_logprobs import Continuations, continuation_logprobs
from stages.models.causal_lm.shared_prompt import shared_prompt_logprobs
from stages.student.batches.episodes import answers_of, subsets_of

EPISODES_AT_A_TIME = 64

F64Array = npt.NDArray[np.float64]
Row = Mapping[str, Any]


def candidate_sums(
    model: PreTrainedModel, rows: Sequence[Row], *, dtype: torch.dtype
) -> list[F64Array]:
    """Return for each ``episodes`` row [N] sums of log p over each candidate's tokens, nats."""
    short = [row for row in rows if row["candidate_lengths_N"].max() == 1]
    by_row = iter(_scored(model, short, lambda row: [answers_of(row)], dtype))
    return [
        next(by_row) if row["candidate_lengths_N"].max() == 1 else _share_prompt(model, row, dtype)
        for row in rows
    ]


def subset_sums(
    model: PreTrainedModel, rows: Sequence[Row], *, dtype: torch.dtype
) -> list[F64Array]:
    """Return for each row [N] log Q of the answer under each subset of its demonstrations.

    ``rows`` are ``episodes`` joined with ``subset_preferences``, which names the subsets.
    """
    return _scored(model, rows, subsets_of, dtype)


def _share_prompt(model: PreTrainedModel, row: Row, dtype: torch.dtype) -> F64Array:
    candidates = split_candidates(row["candidate_ids_C"], row["candidate_lengths_N"])
    prompt_T = row["input_ids_T"][: row["answer_start"]]
    sums_N = shared_prompt_logprobs(model, prompt_T, candidates, dtype=dtype)
    return np.asarray(sums_N.double().cpu(), np.float64)


def _scored(
    model: PreTrainedModel,
    rows: Sequence[Row],
    ask: Callable[[Row], list[Continuations]],
    dtype: torch.dtype,
) -> list[F64Array]:
    """Return the log-probs of all that ``ask`` asks about each row, end to end."""
    found: dict[int, F64Array] = {}
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids_T"]))
    for start in range(0, len(rows), EPISODES_AT_A_TIME):
        group = by_length[start : start + EPISODES_AT_A_TIME]
        asked = [ask(rows[index]) for index in group]
        flat = [item for items in asked for item in items]
        sums = continuation_logprobs(model, flat, dtype=dtype).double().cpu().numpy()
        counts = [sum(len(item.lengths_N) for item in items) for items in asked]
        parts = np.split(sums, np.cumsum(counts)[:-1])
        found.update(zip(group, parts, strict=True))
    return [found[index] for index in range(len(rows))]
