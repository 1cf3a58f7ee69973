"""How likely each symbol is in its context: counted over a shard, and stored once in it.

Counts are rounded down to four significant bits, one byte each, and are a symbol's weight. So all
that is coded has a weight, and every machine makes equal models of equal bytes.

Dimensions: V = vocabulary, C = contexts, X = symbols, L = leaves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LEAF_BITS = 6  # sampled ids lie in 64 leaves of about equal weight, by falling weight
# What a byte stands for: whole numbers to 15, then four significant bits of larger ones.
LEVELS = np.array([*range(16), *((8 + i % 8) << (i // 8 + 1) for i in range(240))], np.int64)


class Counts:
    """Symbols counted by table and context; tables grow as symbols come."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.tables: dict[str, Array] = {}

    def add(self, name: str, contexts_N: Array, symbols_N: Array) -> None:
        """Count ``symbols_N`` of table ``name``."""
        if not len(symbols_N):
            return
        old_CX = self.tables.get(name, np.zeros((0, 0), np.int64))
        num_contexts = max(len(old_CX), int(contexts_N.max()) + 1)
        num_symbols = max(old_CX.shape[1], int(symbols_N.max()) + 1)
        new_CX = np.zeros((num_contexts, num_symbols), np.int64)
        new_CX[: old_CX.shape[0], : old_CX.shape[1]] = old_CX
        cells_N = contexts_N.astype(np.int64) * num_symbols + symbols_N
        new_CX += np.bincount(cells_N, minlength=new_CX.size).reshape(new_CX.shape)
        self.tables[name] = new_CX

    def rounded(self) -> dict[str, Array]:
        """Return the level of each count [C, X], one byte each."""
        return {
            name: (np.searchsorted(LEVELS, counts_CX, side="right") - 1).astype(np.uint8)
            for name, counts_CX in sorted(self.tables.items())
        }


@dataclass(frozen=True, slots=True)
class IdOrder:
    """Sampled ids by falling weight: ``ids`` [V], the place of each [V], and where leaves begin."""

    ids: Array
    place: Array
    starts_L: Array
    sizes_L: Array
    leaf: Array


@dataclass
class Priors:
    """Models of all symbols, each made at its first use, of the levels of their counts [C, X]."""

    levels: Mapping[str, Array]
    vocab_size: int
    order: IdOrder = field(init=False)
    _models: dict[tuple[str, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Lay out the ids by the weights of sampled ones."""
        weights_V = np.zeros(self.vocab_size, np.int64)
        if "tail_id" in self.levels:
            found_X = LEVELS[self.levels["tail_id"][0]]
            weights_V[: len(found_X)] = found_X
        self.order = _order(weights_V)

    def model(self, name: str, context: int, library: Any) -> Any:
        """Return the model of table ``name`` in ``context``."""
        key = name, context
        if key not in self._models:
            weights_X = LEVELS[self.levels[name][context]].astype(np.float32)
            weights_X = np.append(weights_X, np.float32(0.0))  # a model has two symbols or more
            self._models[key] = library.stream.model.Categorical(weights_X, perfect=False)
        return self._models[key]


def _order(weights_V: Array) -> IdOrder:
    ids_V = np.argsort(-weights_V, kind="stable")
    place_V = np.argsort(ids_V, kind="stable")
    running_V = np.cumsum(weights_V[ids_V])
    parts = (np.arange(1, 1 << LEAF_BITS) * (int(running_V[-1]) >> LEAF_BITS)).astype(np.int64)
    starts_L = np.concatenate([[0], np.searchsorted(running_V, parts)])
    ends_L = np.concatenate([starts_L[1:], [len(ids_V)]])
    leaf_V = np.searchsorted(ends_L, np.arange(len(ids_V)), side="right")[place_V]
    sizes_L = (ends_L - starts_L).astype(np.int32)
    return IdOrder(ids_V.astype(np.int32), place_V, starts_L.astype(np.int32), sizes_L, leaf_V)
