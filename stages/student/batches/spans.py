"""Rows of ``aligned_spans`` -> batches: a student's tokens, the span of each, the teacher's sums.

Scored positions are the tokens of a row's spans, end to end. Of variant ``entries`` the teacher's
entries stand at the first position of each span, in the columns of ``top_k``: all else is the rest.
Positions without entries are ``untaught_N``.

Dimensions: N = scored positions of the batch, S = its spans, K = the most entries of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from schemas.scored_spans import SCORED
from stages.student.batches.signals import Collator, Row, check_ids, joined


@dataclass(frozen=True, slots=True)
class SpansCollator:
    """A batch of ``tokens``, with ``span_of_N``, ``span_logprobs_S`` and ``span_bytes_S``.

    ``entries`` decodes the teacher's, too.
    """

    tokens: Collator
    entries: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch; see the module."""
        lengths_S = np.concatenate([np.diff(row[SCORED], axis=1)[:, 0] for row in rows])
        spans = {
            "span_of_N": np.repeat(np.arange(len(lengths_S)), lengths_S),
            "span_logprobs_S": joined(rows, "span_logprobs_S", np.float32),
            "span_bytes_S": joined(rows, "span_bytes_S", np.int64),
        }
        if self.entries:
            check_ids(rows, "entry_ids_E", self.tokens.vocab_size)
            spans |= _entries(rows, lengths_S)
        return self.tokens(rows) | {name: torch.from_numpy(each) for name, each in spans.items()}


def _entries(rows: Sequence[Row], lengths_S: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of ``kl.TopKTeacher``; a place without an entry has probability 0."""
    counts_S = joined(rows, "num_entries_S", np.int64)
    num_entries = int(counts_S.max(initial=1))
    in_use_SK = np.arange(num_entries) < counts_S[:, None]
    ids_SK = np.zeros(in_use_SK.shape, np.int32)
    ids_SK[in_use_SK] = joined(rows, "entry_ids_E", np.int32)
    ids_SK = np.where(in_use_SK, ids_SK, ids_SK[:, :1])
    probs_SK = np.zeros(in_use_SK.shape, np.float32)
    probs_SK[in_use_SK] = np.exp(joined(rows, "entry_logprobs_E", np.float32))
    mass_S = probs_SK.sum(axis=1)
    probs_SK /= np.maximum(mass_S, 1.0)[:, None]  # float16 leaves some a little above one
    first_S = np.cumsum(lengths_S) - lengths_S
    size = int(lengths_S.sum())
    columns = {
        "token_ids_NK": np.zeros((size, num_entries), np.int32),
        "probs_NK": np.zeros((size, num_entries), np.float32),
        "rest_N": np.zeros(size, np.float32),
        "untaught_N": np.ones(size, bool),
    }
    columns["token_ids_NK"][first_S] = ids_SK
    columns["probs_NK"][first_S] = probs_SK
    columns["rest_N"][first_S] = np.where(counts_S > 0, np.maximum(1.0 - mass_S, 0.0), 0.0)
    columns["untaught_N"][first_S] = counts_S == 0
    return columns
