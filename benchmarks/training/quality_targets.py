"""Sparse targets that the product does not store, made of the rows of an ``exact`` table.

Each becomes the columns that the product's own ``kd`` objective reads, so a student trained on
them differs from one trained on our tables in the targets alone:

- top-k renormalised: the k largest probabilities divided by their sum; what is missing is worth
  nothing, which is what most peers' top-k losses come to
- RS-KD (arXiv 2503.16870): tokens drawn with replacement, weights count / draws, through the
  published 3-byte payload and back
- top-k and rest: the product's ``top_k`` encoding, one bucket for all that was not kept

Dimensions: P = scored positions of a row, K = kept entries, N = scored positions of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.storage.peer_layouts import pack_draws, unpack_draws
from schemas.dataset import CachedDataset
from stages.models.causal_lm.language_head import LanguageHead
from stages.signals.scoring.encoding import measure, top_k
from stages.student.batches.signals import Collator

Array = npt.NDArray[Any]
Columns = dict[str, Array]
Row = Mapping[str, Any]
RENORMALISED_K, REST_K, DRAWS = 12, 50, 50
# Blocks of logits above 32 MiB go back to the system when freed. Smaller ones stay in glibc's heap,
# where the targets kept between them make holes that no later block fits: 8 GB for 225 rows.
ROWS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class TargetCollator:
    """Batches of the product's collator with targets looked up by ``sample_id``."""

    plain: Collator
    targets: Mapping[str, Columns]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self.plain(rows)
        found = [self.targets[row["sample_id"]] for row in rows]
        for name in found[0]:
            batch[name] = torch.from_numpy(np.concatenate([columns[name] for columns in found]))
        return batch


def converted(dataset: CachedDataset, head: LanguageHead) -> dict[str, dict[str, Columns]]:
    """Return the columns of every row by target and ``sample_id``; one pass over the teacher."""
    torch.manual_seed(0)  # of the draws
    targets: dict[str, dict[str, Columns]] = {name: {} for name in TARGETS}
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        rows = [dataset[i] for i in range(start, min(start + ROWS_AT_ONCE, len(dataset)))]
        hidden_PD = np.concatenate([row["hidden_PD"] for row in rows]).astype(np.float32)
        logits_PV = head.logits(torch.from_numpy(hidden_PD))
        entropies_P = np.concatenate([row["entropies_P"] for row in rows]).astype(np.float32)
        ends = np.cumsum([len(row["entropies_P"]) for row in rows])[:-1]
        for name, make in TARGETS.items():
            columns = make(logits_PV.clone(), entropies_P)
            parts = {column: np.split(values, ends) for column, values in columns.items()}
            for at, row in enumerate(rows):
                targets[name][row["sample_id"]] = {key: part[at] for key, part in parts.items()}
    return targets


def _renormalised(logits_PV: Tensor, entropies_P: Array) -> Columns:
    top_PK, ids_PK = logits_PV.topk(RENORMALISED_K, dim=-1)
    return _weighted(ids_PK.numpy(), top_PK.softmax(dim=-1).numpy(), entropies_P)


def _drawn(logits_PV: Tensor, entropies_P: Array) -> Columns:
    drawn_PN = logits_PV.softmax(dim=-1).multinomial(DRAWS, replacement=True)
    ids_PK, weights_PK = unpack_draws(*pack_draws(drawn_PN.numpy()), num_draws=DRAWS)
    spare = ((0, 0), (0, DRAWS - ids_PK.shape[1]))  # rows of one batch need one K
    return _weighted(np.pad(ids_PK, spare), np.pad(weights_PK, spare), entropies_P)


def _weighted(ids_PK: Array, weights_PK: Array, entropies_P: Array) -> Columns:
    return {
        "token_ids_NK": ids_PK.astype(np.int32),
        "weights_NK": weights_PK.astype(np.float32),
        "num_head_N": np.zeros(len(ids_PK), np.uint8),
        "entropies_N": entropies_P,
        "dropped_N": np.zeros(len(ids_PK), np.float32),
    }


def _with_rest(logits_PV: Tensor, entropies_P: Array) -> Columns:
    any_token_P = torch.zeros(len(logits_PV), dtype=torch.long)
    kept = top_k(measure(logits_PV, any_token_P), k=REST_K)
    return {
        "token_ids_NK": kept.token_ids_PK.numpy().astype(np.int32),
        "probs_NK": kept.logprobs_PK.exp().numpy(),
        "rest_N": kept.rest_logprobs_P.exp().numpy(),
        "entropies_N": entropies_P,
        "dropped_N": np.zeros(len(logits_PV), np.float32),
    }


TARGETS: dict[str, Callable[[Tensor, Array], Columns]] = {
    f"top-{RENORMALISED_K} renormalised": _renormalised,
    f"top-{REST_K} and rest": _with_rest,
    f"RS-KD, {DRAWS} draws": _drawn,
}
