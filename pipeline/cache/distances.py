"""How far two rows of one table are apart: column by column, and as distributions of tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.distribution import unpack_top_k, weighted_tokens

FIRST = 3  # sample ids that are named

F64Array = npt.NDArray[np.float64]
Decoded = tuple[npt.NDArray[np.int64], F64Array, F64Array]  # ids, weights [P, K]; the rest's [P]


@dataclass(slots=True)
class ColumnDifference:
    """A column's values over the rows in which they differ.

    ``num_reshaped`` counts rows with another number of values; of the others, ``most`` and ``mean``
    are absolute differences of numbers, where they measure something and are no token ids. A value
    that one side does not know (NaN) is left out.
    """

    measures: bool
    num_rows: int = 0
    num_reshaped: int = 0
    num_values: int = 0
    most: float = 0.0
    total: float = 0.0
    first: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """The mean absolute difference of all values of these rows."""
        return self.total / self.num_values if self.num_values else 0.0

    def add(self, sample_id: str, a: Any, b: Any) -> bool:
        """Take one row's values; return whether they differ."""
        one, other = np.asarray(a), np.asarray(b)
        if are_equal(one, other):
            return False
        self.num_rows += 1
        if len(self.first) < FIRST:
            self.first.append(sample_id)
        if one.shape != other.shape:
            self.num_reshaped += 1
        elif self.measures and one.dtype.kind in "iuf" and other.dtype.kind in "iuf":
            apart = np.abs(one.astype(np.float64) - other.astype(np.float64)).ravel()
            apart = apart[~np.isnan(apart)]
            self.num_values += apart.size
            self.most = max(self.most, float(apart.max(initial=0.0)))
            self.total += float(apart.sum())
        return True


def are_equal(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Whether two values or arrays are the same, whatever type holds them; NaN equals NaN."""
    are_floats = a.dtype.kind == b.dtype.kind == "f"
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=are_floats))


def decoded(row: Mapping[str, Any], variant: str) -> Decoded | None:
    """Return the distributions of a ``teacher_logits`` row; None for ``exact``, without its head.

    A sparse sample stands for the whole distribution, so nothing is left for the rest; of ``top_k``
    the rest has the mass that its tokens do not.
    """
    rest_P: npt.NDArray[Any]
    if variant in ("threshold", "threshold_tau"):
        ids_PK, weights_PK = weighted_tokens(row)
        rest_P = np.zeros(len(ids_PK))
    elif variant == "top_k":
        ids_PK = row["token_ids_PK"]
        weights_PK, rest_P = unpack_top_k(row["logprobs_PK"], row["rest_logprobs_P"])
    else:
        return None
    return ids_PK.astype(np.int64), weights_PK.astype(np.float64), rest_P.astype(np.float64)


def total_variation(a: Decoded, b: Decoded) -> F64Array:
    """Return half the sum of ``|p_a(v) - p_b(v)|`` over tokens and the rest, 0 to 1, for each [P].

    Two samples of one distribution are apart as well, by what sampling costs.
    """
    ids_PN = np.concatenate([a[0], b[0]], axis=1)
    signed_PN = np.concatenate([a[1], -b[1]], axis=1)
    order_PN = np.argsort(ids_PN, axis=1, kind="stable")
    ids_PN = np.take_along_axis(ids_PN, order_PN, axis=1)
    signed_PN = np.take_along_axis(signed_PN, order_PN, axis=1)
    is_first_PN = np.ones(ids_PN.shape, bool)
    is_first_PN[:, 1:] = ids_PN[:, 1:] != ids_PN[:, :-1]
    starts = np.flatnonzero(is_first_PN)
    num_positions, width = ids_PN.shape
    if not starts.size:
        return np.zeros(num_positions)
    sums = np.abs(np.add.reduceat(signed_PN.ravel(), starts))
    apart_P = np.bincount(starts // width, weights=sums, minlength=num_positions)
    return np.asarray((apart_P + np.abs(a[2] - b[2])) / 2)
