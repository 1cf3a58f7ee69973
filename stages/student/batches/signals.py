"""Cached rows -> training batches: decode in the workers, pad on the right, keep scored positions.

Entry j of a signal row is the distribution over the token at index ``first_target + j`` (of a row
that names spans: over its j-th scored token); the student's hidden state one index before it is
what predicts it. A batch therefore
carries ``positions_N``, the places of those hidden states in the flattened [B, T] batch, and every
other array with N in its name is aligned with it. Targets are not padded: N is their true number.

Rows are padded on the right and there is no attention mask. In a causal model no position sees
what comes after it, so padding cannot reach a scored position, and without a mask attention stays
on its fast path.

Dimensions: B = rows, T = tokens of the longest row, P = scored positions of a row, N = scored
positions of the batch, K = kept entries, D = hidden width of the teacher.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from schemas.dataset import CachedDataset
from schemas.distribution import (
    MAX_MASS_ERROR,
    unpack_threshold,
    unpack_threshold_tau,
    unpack_top_k,
)
from schemas.errors import StoreError, TeacherCacheError
from schemas.rounded_states import hidden_states
from schemas.scored_spans import scored_targets
from stages.student.batches.padding_ids import drop_from_threshold, drop_from_top_k

IGNORED = -100  # transformers counts labels other than this one as tokens of the step

Array = npt.NDArray[Any]
Row = Mapping[str, Any]
EncodingName = Literal["", "threshold", "threshold_tau", "top_k", "exact", "exact_int8"]
SAMPLED = ("threshold", "threshold_tau")  # weighted tokens, unbiased together


class SignalRows(Dataset[Row]):
    """The joined rows of a cached data set, for torch's loaders: map-style and picklable."""

    def __init__(self, dataset: CachedDataset) -> None:
        """Wrap an opened data set; workers reopen its files."""
        self.dataset = dataset

    def __len__(self) -> int:
        """The number of joined rows."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        """Return the columns of one row as stored."""
        return self.dataset[index]


def encoding_of(dataset: CachedDataset) -> EncodingName:
    """Return the encoding of the data set's teacher table, ``""`` when it has none."""
    variants = [m.variant for m in dataset.manifests if m.table == "teacher_logits"]
    return variants[0] if variants else ""  # type: ignore[return-value]


@contextmanager
def worker_errors_as_raised() -> Iterator[None]:
    """Raise a loader worker's error with its own line; torch puts the worker's traceback there."""
    try:
        yield
    except TeacherCacheError as error:
        *around, last = str(error).splitlines()
        if not around:
            raise
        kind = type(error)
        raise kind(last.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")) from error


@dataclass(frozen=True, slots=True)
class Collator:
    """Make one batch of decoded tensors; ``encoding`` is ``""`` to leave the teacher out.

    A teacher's entries on ids from ``num_token_ids`` on, which no token uses, are dropped. With
    ``packing`` all rows lie end to end in one, without padding, and ``position_ids`` part them.
    """

    encoding: EncodingName
    vocab_size: int
    num_token_ids: int | None = None
    packing: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return ``input_ids`` and ``labels`` [B, T], ``positions_N`` and the targets."""
        lengths = np.array([len(row["input_ids_T"]) for row in rows])
        widths = lengths if self.packing else np.full(len(rows), max(lengths))
        starts, size = np.cumsum(widths) - widths, int(widths.sum())
        input_ids = np.zeros(size, np.int64)
        labels = np.full(size, IGNORED, np.int64)
        position_ids = np.zeros(size, np.int64)
        positions = []
        for start, row in zip(starts, rows, strict=True):
            ids_T, targets_P = row["input_ids_T"], scored_targets(row)
            input_ids[start : start + len(ids_T)] = ids_T
            position_ids[start : start + len(ids_T)] = np.arange(len(ids_T))
            labels[start + targets_P] = ids_T[targets_P]
            positions.append(start + targets_P - 1)
        check_ids(rows, "input_ids_T", self.vocab_size)
        height = 1 if self.packing else len(rows)
        batch = {
            "input_ids": input_ids.reshape(height, -1),
            "labels": labels.reshape(height, -1),
            "positions_N": np.concatenate(positions),
            "next_token_ids_N": labels[labels != IGNORED],
        }
        if self.packing:
            batch["position_ids"] = position_ids[None]
        if self.encoding:
            batch |= self.decoded(rows)
        tensors: dict[str, Any] = {name: torch.from_numpy(each) for name, each in batch.items()}
        return tensors | ({"num_samples": len(rows)} if self.packing else {})

    def decoded(self, rows: Sequence[Row]) -> dict[str, Array]:
        """Return the teacher's columns, each aligned with the positions of the rows in order."""
        assert self.encoding, "a teacher's table"
        batch = DECODERS[self.encoding](rows, self.num_token_ids)
        batch["teacher_next_logprobs_N"] = joined(rows, "next_token_logprobs_P", np.float32)
        if "token_ids_NK" in batch:
            if self.encoding == "threshold_tau":
                ends = np.cumsum([len(row["num_tail_P"]) for row in rows])[:-1]
                parts = zip(rows, np.split(batch["token_ids_NK"], ends), strict=True)
                rows = [{"sample_id": row["sample_id"], "token_ids_PK": ids} for row, ids in parts]
            check_ids(rows, "token_ids_PK", self.vocab_size, self.num_token_ids)
        return batch


def check_ids(
    rows: Sequence[Row], column: str, vocab_size: int, num_token_ids: int | None = None
) -> None:
    """Raise StoreError for a row with a token id that the student does not have.

    Ids from ``num_token_ids`` on, which are dropped, may be any.
    """
    for row in rows:
        ids = row[column]
        largest = int(ids.max(initial=0))
        if largest >= vocab_size and num_token_ids is not None:
            largest = int(ids[ids < num_token_ids].max(initial=0))
        if largest >= vocab_size:
            raise StoreError(
                f"sample {row['sample_id']}: {column} holds id {largest}, the student has "
                f"{vocab_size} tokens: run `teachercache verify` on the data"
            )


def joined(rows: Sequence[Row], name: str, dtype: npt.DTypeLike) -> Array:
    """Return one column of all rows, end to end."""
    column: Array = np.concatenate([row[name] for row in rows]).astype(dtype)
    return column


def _threshold(rows: Sequence[Row], num_token_ids: int | None) -> dict[str, Array]:
    token_ids_NK = joined(rows, "token_ids_PK", np.int32)
    num_head_N = joined(rows, "num_head_P", np.uint8)
    codes_E = joined(rows, "head_codes_E", np.uint8)
    columns = {
        "token_ids_NK": token_ids_NK,
        "weights_NK": unpack_threshold(token_ids_NK, num_head_N, codes_E),
        "num_head_N": num_head_N,
        "entropies_N": joined(rows, "entropies_P", np.float32),
    }
    return drop_from_threshold(columns, num_token_ids)


def _threshold_tau(rows: Sequence[Row], num_token_ids: int | None) -> dict[str, Array]:
    """Decode; K is the most entries of a position of the batch."""
    names = ("num_head_P", "num_tail_P", "head_codes_H", "tail_gaps_low_E")
    packed = {name: joined(rows, name, np.uint8) for name in names}
    packed |= {name: joined(rows, name, np.int32) for name in ("head_ids_H", "tail_gaps_high_E")}
    token_ids_NK, weights_NK = unpack_threshold_tau(packed)
    columns = {
        "token_ids_NK": token_ids_NK.astype(np.int32),
        "weights_NK": weights_NK,
        "num_head_N": packed["num_head_P"],
        "entropies_N": joined(rows, "entropies_P", np.float32),
    }
    return drop_from_threshold(columns, num_token_ids)


def _top_k(rows: Sequence[Row], num_token_ids: int | None) -> dict[str, Array]:
    """Decode; float16 leaves the K + 1 buckets a little off one, which is divided out.

    Where they are off by more, the row says of itself that it is wrong; raises StoreError.
    """
    logprobs_NK = joined(rows, "logprobs_PK", np.float16)
    probs_NK, rest_N = unpack_top_k(logprobs_NK, joined(rows, "rest_logprobs_P", np.float16))
    mass_N = probs_NK.sum(axis=1) + rest_N
    if mass_N.size and not float(np.abs(mass_N - 1).max()) <= MAX_MASS_ERROR:
        place = int(np.abs(mass_N - 1).argmax())
        ends = np.cumsum([len(row["rest_logprobs_P"]) for row in rows])
        row = rows[int(np.searchsorted(ends, place, side="right"))]
        raise StoreError(
            f"sample {row['sample_id']}: the mass of a position is {mass_N[place]:.3f}, not 1: run "
            f"`teachercache verify` on the data, which names the shard and says how to mend it"
        )
    columns = {
        "token_ids_NK": joined(rows, "token_ids_PK", np.int32),
        "probs_NK": probs_NK / mass_N[:, None],
        "rest_N": rest_N / mass_N,
        "entropies_N": joined(rows, "entropies_P", np.float32),
    }
    return drop_from_top_k(columns, num_token_ids)


def _exact(rows: Sequence[Row], num_token_ids: int | None) -> dict[str, Array]:
    """Decode; the head, which knows what is padding, is the trainer's to hold."""
    return {
        "hidden_ND": np.concatenate([hidden_states(row) for row in rows]),
        "entropies_N": joined(rows, "entropies_P", np.float32),
    }


DECODERS: dict[str, Callable[[Sequence[Row], int | None], dict[str, Array]]] = {
    "threshold": _threshold,
    "threshold_tau": _threshold_tau,
    "top_k": _top_k,
    "exact": _exact,
    "exact_int8": _exact,
}
