"""Prompts with their responses, out of either table that has them: what a model is asked to score.

Token j of a response is predicted at index ``len(prompt) - 1 + j`` of prompt + response, so the
last token of a response is fed to nobody, and the states that count are the last ones of what is.

Dimensions: T = tokens of a prompt, A = tokens of all responses to it, end to end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from schemas.tables.episodes import split_candidates
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.responses import RESPONSES
from stages.engines.sequences import TokenIds


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
