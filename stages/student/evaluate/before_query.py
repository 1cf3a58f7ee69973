"""What a frozen reader is given before a query: a distiller's vectors, or what stands beside them.

=====================  ==========================================================================
``zero-shot``          nothing
``random vectors``     as many random rows of the reader's vocabulary as the distiller makes vectors
``mean pooling``       as many means of the embeddings of what the distiller reads, each of one of
                       as many equal segments
``fewer shots``        as text, the first whole demonstrations that take no more positions than that
``all demonstrations`` as text, the demonstrations that the teacher reads
=====================  ==========================================================================

Mean pooling is of the reader's input embeddings, the states that its first layer reads: these it
can be fed untrained. Its last hidden states are made for its head; fed to the first layer they are
out of its range, and to learn a map between the two would be another distiller. Neighbouring
segments share a token where the number of tokens is no multiple of theirs.

Dimensions: B = rows, L = tokens of demonstrations, M = vectors, R = the reader's width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d
from transformers import PreTrainedModel

from stages.student.batches.demonstrations import distiller_tokens
from stages.student.evaluate.stage import ALL, FEWER, POOLED, RANDOM, ZERO_SHOT

Array = npt.NDArray[Any]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Given:
    """What ``model`` makes of the demonstrations ``tokens_of`` a row, to stand before its query.

    ``model`` is called as a distiller is. ``num_vectors`` is None where it gives a position a
    token: then it takes rows of one length alone.
    """

    model: Any
    num_vectors: int | None
    tokens_of: Callable[[Row], Array] = distiller_tokens

    def num_positions(self, row: Row) -> int:
        """Return how many positions the reader reads before the row's query."""
        return len(self.tokens_of(row)) if self.num_vectors is None else self.num_vectors

    def before(self, row: Row) -> Tensor:
        """Return [M, R] what the reader reads before the row's query."""
        ids_L = torch.from_numpy(np.asarray(self.tokens_of(row), np.int64)).to(self.model.device)
        vectors_BMR: Tensor = self.model(ids_L[None], torch.tensor([len(ids_L)]))
        return vectors_BMR[0]


class FixedVectors(nn.Module):
    """The same vectors [M, R] before every query, whatever is demonstrated; M may be 0."""

    def __init__(self, vectors_MR: Tensor) -> None:
        """Hold them."""
        super().__init__()
        self.vectors_MR = vectors_MR

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.vectors_MR.device

    def forward(self, input_ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return [B, M, R]."""
        return self.vectors_MR.expand(len(lengths_B), -1, -1)


class Embedded(nn.Module):
    """The reader's own embeddings of the tokens, or their means over ``num_vectors`` segments."""

    def __init__(self, reader: PreTrainedModel, num_vectors: int | None) -> None:
        """Hold the reader's embeddings; without ``num_vectors`` tokens are left as they are."""
        super().__init__()
        self.embed: Any = reader.get_input_embeddings()
        self.num_vectors = num_vectors

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        device: torch.device = self.embed.weight.device
        return device

    def forward(self, input_ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return [B, M, R], or [B, L, R] of rows of one length."""
        embedded_BLR: Tensor = self.embed(input_ids_BL)
        if self.num_vectors is None:
            assert bool((lengths_B == input_ids_BL.shape[1]).all()), "text has no padding"
            return embedded_BLR
        pooled = [
            adaptive_avg_pool1d(row_LR[:length].T, self.num_vectors).T
            for row_LR, length in zip(embedded_BLR, lengths_B.tolist(), strict=True)
        ]
        return torch.stack(pooled)


@dataclass(frozen=True, slots=True)
class FirstDemonstrations:
    """The tokens of a row's first whole demonstrations, at most ``limit``; maybe none."""

    limit: int

    def __call__(self, row: Row) -> Array:
        """Return them; teacher and distiller begin with the same."""
        ends_M = np.asarray(row["demonstration_ends_M"], np.int64)
        length = int(ends_M[ends_M <= self.limit].max(initial=0))
        read = teacher_tokens(row), distiller_tokens(row)
        return max(read, key=len)[:length]


def teacher_tokens(row: Row) -> Array:
    """Return the demonstrations that the teacher reads."""
    tokens: Array = row["input_ids_T"][: row["query_start"]]
    return tokens


def beside_distillers(
    reader: PreTrainedModel, num_vectors: int, num_token_ids: int | None
) -> dict[str, Given]:
    """Return what stands beside distillers of so many vectors; see the module.

    Ids from ``num_token_ids`` on are no token's (None: not known).
    """
    embed: Any = reader.get_input_embeddings()
    num_rows = len(embed.weight[:num_token_ids])
    generator = torch.Generator().manual_seed(0)
    drawn_M = torch.randperm(num_rows, generator=generator)[:num_vectors]
    random_MR = embed(drawn_M.to(embed.weight.device)).detach()
    text = Embedded(reader, None)
    return {
        ZERO_SHOT: Given(FixedVectors(random_MR[:0]), 0),
        RANDOM: Given(FixedVectors(random_MR), len(random_MR)),
        POOLED: Given(Embedded(reader, num_vectors), num_vectors),
        FEWER: Given(text, None, FirstDemonstrations(num_vectors)),
        ALL: Given(text, None, teacher_tokens),
    }
