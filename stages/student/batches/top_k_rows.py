"""Cached rows -> the K likeliest tokens of each scored position, for trainers that are not ours.

Of a ``top_k`` table they are what is stored, of an ``exact`` one they are computed from its hidden
states and its head, in blocks of bounded memory. A ``threshold`` table has a sample of the tail in
the place of the tokens after the head, so it is refused: as a top-k it would be biased.

Dimensions: T = tokens of a row, P = its scored positions, K = kept tokens, D = hidden width, V =
vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.dataset import CachedDataset
from schemas.errors import ConfigError
from schemas.rounded_states import hidden_states
from schemas.scored_spans import scored_targets
from schemas.tables.teacher_logits import WHOLE
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.batches.signals import IGNORED, SAMPLED, encoding_of
from stages.student.batches.training_data import teacher_head_of

Array = npt.NDArray[Any]
ROWS_AT_ONCE = 16
LOGITS_BYTES = 256 << 20  # of the float32 logits of a block of positions


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row's ids, and the indices [P] of its scored tokens: entry j is about ``targets_P[j]``."""

    sample_id: str
    input_ids_T: Array
    targets_P: Array

    @property
    def labels_T(self) -> Array:
        """The scored tokens' ids at their own places, -100 elsewhere (int32)."""
        labels_T = np.full(len(self.input_ids_T), IGNORED, np.int32)
        labels_T[self.targets_P] = self.input_ids_T[self.targets_P]
        return labels_T


@dataclass(frozen=True, slots=True)
class TopKRow(TokenRow):
    """Of each scored position the likeliest tokens, falling, and the log of all others' mass.

    Log-probs are float32, natural, of the whole vocabulary at temperature 1.
    """

    token_ids_PK: Array
    logprobs_PK: Array
    rest_logprobs_P: Array


def token_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ``TokenRow`` of a joined row; raises StoreError where they disagree."""
    return {
        "sample_id": row["sample_id"],
        "input_ids_T": row["input_ids_T"].astype(np.int32),
        "targets_P": scored_targets(row),
    }


def require_signals(dataset: CachedDataset) -> None:
    """Raise ConfigError unless the tables are token rows and ``teacher_logits`` about them."""
    tables = [manifest.table for manifest in dataset.manifests]
    is_input = "input_ids_T" in dataset[0]
    if len(tables) != 2 or tables.count("teacher_logits") != 1 or not is_input:
        raise ConfigError(
            f"--data are the tables {', '.join(tables)}, expected two: one of token ids "
            f"(documents, conversations, episodes or demonstrations) and its teacher_logits"
        )


class TopKRows:
    """The joined rows of a data set, decoded; ``mean_rest`` is told when they have been read."""

    def __init__(self, dataset: CachedDataset, k: int | None) -> None:
        """Check that K tokens can be had; raises ConfigError in one line where they cannot."""
        require_signals(dataset)
        self.dataset = dataset
        self.encoding = encoding_of(dataset)
        self.num_positions = 0
        self._sum_rest = 0.0
        manifests = zip(dataset.folders, dataset.manifests, strict=True)
        folder, manifest = next(
            (folder, each) for folder, each in manifests if each.table == "teacher_logits"
        )
        if self.encoding in SAMPLED:
            raise ConfigError(
                f"{folder} has the encoding {self.encoding}, a sample of each distribution that "
                f"is no top-k: export it with its weights (--to parquet-sampled), or capture it "
                f"again with the encoding top_k or exact"
            )
        if self.encoding in WHOLE:
            most, has = manifest.vocab_size, "has a vocabulary of {} tokens"
            if k is None:
                raise ConfigError(
                    f"{folder} has the encoding {self.encoding}, every token of each distribution: "
                    f"say how many to export, such as --k 64"
                )
        else:
            most, has = dataset[0]["token_ids_PK"].shape[1], "keeps {} tokens of a position"
        if k is not None and k > most:
            raise ConfigError(f"--k is {k}, {folder} {has.format(most)}: ask for at most {most}")
        self.k = k or most
        # An import of log-probs that were made to sum to one over the kept tokens says so.
        config = manifest.identity.get("config", {})
        self.is_renormalised = bool(config.get("renormalised"))

    @property
    def mean_rest(self) -> float:
        """Mean mass of a distribution outside its K tokens, over what was read."""
        return self._sum_rest / max(self.num_positions, 1)

    def __iter__(self) -> Iterator[TopKRow]:
        """Decode some rows at a time, in the order of the first table."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        head = teacher_head_of(self.dataset, device)
        for start in range(0, len(self.dataset), ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, len(self.dataset))
            rows = [self.dataset[place] for place in range(start, stop)]
            for row, kept in zip(rows, self._decoded(rows, head), strict=True):
                ids_PK, logprobs_PK, rest_P = kept
                self.num_positions += len(rest_P)
                self._sum_rest += float(np.exp(rest_P, dtype=np.float64).sum())
                yield TopKRow(
                    **token_row(row),
                    token_ids_PK=ids_PK.astype(np.int32),
                    logprobs_PK=logprobs_PK,
                    rest_logprobs_P=rest_P,
                )

    def _decoded(
        self, rows: Sequence[dict[str, Any]], head: LanguageHead | None
    ) -> list[tuple[Array, Array, Array]]:
        if head is None:
            return [_cut(row, self.k) for row in rows]
        states = [hidden_states(row) for row in rows]
        hidden_PD = torch.from_numpy(np.concatenate(states))
        blocks = torch.split(hidden_PD, head.positions_per_chunk(LOGITS_BYTES))
        parts = zip(*(_largest(head.logits(block_PD), self.k) for block_PD in blocks), strict=True)
        ends = np.cumsum([*map(len, states)])[:-1]
        columns = [np.split(np.concatenate(part), ends) for part in parts]
        return list(zip(*columns, strict=True))


def _cut(row: dict[str, Any], k: int) -> tuple[Array, Array, Array]:
    """Return the first K of what a ``top_k`` row keeps; the others' mass joins the rest."""
    logprobs_PK = row["logprobs_PK"].astype(np.float32)
    rest_P = row["rest_logprobs_P"].astype(np.float32)
    for entry in range(k, logprobs_PK.shape[1]):
        rest_P = np.logaddexp(rest_P, logprobs_PK[:, entry])
    return row["token_ids_PK"][:, :k], logprobs_PK[:, :k], rest_P


def _largest(logits_PV: Tensor, k: int) -> tuple[Array, Array, Array]:
    """Return ids, log-probs and the log of the rest's mass, summed from its own entries."""
    log_total_P = logits_PV.logsumexp(dim=-1)
    top_PK, ids_PK = logits_PV.topk(k, dim=-1)
    rest_P = logits_PV.scatter_(1, ids_PK, -torch.inf).logsumexp(dim=-1) - log_total_P
    found = ids_PK, top_PK - log_total_P[:, None], rest_P
    ids, logprobs, rest = (part.cpu().numpy() for part in found)
    return ids, logprobs, rest
