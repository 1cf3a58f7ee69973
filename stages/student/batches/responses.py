"""Rows of responses -> batches: each response after its prompt, with two models' log-probs.

Positions lie in the order of the responses, those of a row one after another, as its columns do.

Dimensions: N = tokens of all responses of the batch, A = those of one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from schemas.dataset import CachedDataset
from schemas.errors import IdentityMismatch, StoreError
from stages.student.batches.pairs import response_rows
from stages.student.batches.signals import Collator, Row, joined

SCORES = "response_token_logprobs"


@dataclass(frozen=True, slots=True)
class OpdCollator:
    """The responses, what the teacher gives each token and what its writer gave it."""

    vocab_size: int

    @classmethod
    def of(cls, dataset: CachedDataset, vocab_size: int) -> "OpdCollator":
        """Refuse scores that were made of another table; raises IdentityMismatch."""
        tables = dict(zip((m.table for m in dataset.manifests), dataset.manifests, strict=True))
        folders = dict(zip(tables, dataset.folders, strict=True))
        made_of = tables[SCORES].identity.get("inputs")
        if made_of is not None and tables["responses"].fingerprint not in made_of:
            raise IdentityMismatch(
                f"{folders[SCORES]} scores other responses than those of {folders['responses']}: "
                f"open the table that it was made of"
            )
        return cls(vocab_size)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch; raises StoreError for scores of responses of other lengths."""
        for row in rows:
            lengths = row["response_lengths_N"].tolist()
            if row["response_num_tokens_N"].tolist() != lengths:
                raise StoreError(
                    f"sample {row['sample_id']}: scores of responses of "
                    f"{row['response_num_tokens_N'].tolist()} tokens, those that are there have "
                    f"{lengths}: open the scores that were made of these responses"
                )
        responses = [response for row in rows for response in response_rows(row)]
        batch: dict[str, Any] = {**Collator("", self.vocab_size)(responses)}
        return batch | {
            "num_samples": len(rows),
            "teacher_logprobs_N": torch.from_numpy(joined(rows, "token_logprobs_A", np.float32)),
            "writer_logprobs_N": torch.from_numpy(joined(rows, "logprobs_A", np.float32)),
        }
