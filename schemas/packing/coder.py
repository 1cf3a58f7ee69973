"""Symbols <-> bytes under the priors of a shard: ANS of the package ``constriction``.

A stack: what is packed last is read first. ``Packer`` so keeps what it is told and codes it in
reverse at the end. One walk over the columns (``entries``) serves ``Counter``, ``Packer`` and
``Unpacker``, which so meet equal contexts. Symbols of equal contexts are coded together.

Dimensions: N = symbols of one call.
"""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import StoreError
from .priors import Counts, Priors

Array = npt.NDArray[Any]
MISSING = (
    "this table is in the packed layout, whose coder is not installed: "
    "pip install 'teachercache[packed]' (or constriction, beside the slim reader)"
)


class Coder(Protocol):
    """What walks over columns: each call takes symbols, or makes them, and returns them."""

    def coded(self, name: str, contexts_N: Array, symbols_N: Array | None) -> Array:
        """Symbols of table ``name``, each under the prior of its context."""

    def alike(self, name: str, count: int, symbols_N: Array | None) -> Array:
        """``count`` symbols of table ``name``, which has one context."""

    def even(self, sizes_N: Array, symbols_N: Array | None) -> Array:
        """Symbols each of which is as likely as all others below its size."""


class Counter:
    """Counts symbols by context, from which priors are made."""

    def __init__(self, counts: Counts) -> None:
        """Count into ``counts``."""
        self._counts = counts

    def coded(self, name: str, contexts_N: Array, symbols_N: Array | None) -> Array:
        """Count symbols by their contexts."""
        assert symbols_N is not None
        self._counts.add(name, contexts_N, symbols_N)
        return symbols_N

    def alike(self, name: str, count: int, symbols_N: Array | None) -> Array:
        """Count symbols."""
        assert symbols_N is not None
        self._counts.add(name, np.zeros(count, np.int64), symbols_N)
        return symbols_N

    def even(self, sizes_N: Array, symbols_N: Array | None) -> Array:
        """Nothing to count."""
        assert symbols_N is not None
        return symbols_N


class Packer:
    """Codes the symbols of one record batch."""

    def __init__(self, priors: Priors) -> None:
        """Begin with nothing."""
        self._priors, self._library = priors, coding_library()
        self._told: list[tuple[Any, ...]] = []

    def coded(self, name: str, contexts_N: Array, symbols_N: Array | None) -> Array:
        """Take symbols."""
        assert symbols_N is not None
        _in_groups(contexts_N, symbols_N, lambda c, part: self._tell(part, self._model(name, c)))
        return symbols_N

    def alike(self, name: str, count: int, symbols_N: Array | None) -> Array:
        """Take symbols."""
        assert symbols_N is not None
        return self._tell(symbols_N, self._model(name, 0)) if count else symbols_N

    def even(self, sizes_N: Array, symbols_N: Array | None) -> Array:
        """Take symbols."""
        assert symbols_N is not None
        self._tell(symbols_N, self._library.stream.model.Uniform(), sizes_N.astype(np.int32))
        return symbols_N

    def packed(self) -> bytes:
        """Return the bytes of all that was taken."""
        stack = self._library.stream.stack.AnsCoder()
        for symbols_N, *model in reversed(self._told):
            stack.encode_reverse(symbols_N, *model)
        return bytes(stack.get_compressed().astype("<u4").tobytes())

    def _model(self, name: str, context: int) -> Any:
        return self._priors.model(name, context, self._library)

    def _tell(self, symbols_N: Array, *model: Any) -> Array:
        if len(symbols_N):
            self._told.append((symbols_N.astype(np.int32), *model))
        return symbols_N


class Unpacker:
    """Gives back the symbols of one record batch, in the order in which they were taken."""

    def __init__(self, priors: Priors, packed: bytes) -> None:
        """Begin at the first symbol."""
        self._priors, self._library = priors, coding_library()
        self._stack = self._library.stream.stack.AnsCoder(
            np.frombuffer(packed, "<u4").astype(np.uint32)
        )
        self._even = self._library.stream.model.Uniform()

    def coded(self, name: str, contexts_N: Array, symbols_N: Array | None = None) -> Array:
        """Make symbols."""
        decode, model, library = self._stack.decode, self._priors.model, self._library
        return _in_groups(
            contexts_N, contexts_N, lambda c, part: decode(model(name, c, library), len(part))
        )

    def alike(self, name: str, count: int, symbols_N: Array | None = None) -> Array:
        """Make symbols."""
        if not count:
            return np.zeros(0, np.int32)
        model = self._priors.model(name, 0, self._library)
        return np.asarray(self._stack.decode(model, count))

    def even(self, sizes_N: Array, symbols_N: Array | None = None) -> Array:
        """Make symbols."""
        return np.asarray(self._stack.decode(self._even, sizes_N.astype(np.int32)))

    def finish(self) -> None:
        """Raise ValueError where bytes are left."""
        if not self._stack.is_empty():
            raise ValueError("its bytes do not end where its rows do")


def _in_groups(contexts_N: Array, given_N: Array, code: Callable[[int, Array], Array]) -> Array:
    """Code the symbols of each context together, by rising context; return them in their places."""
    made_N = np.empty(len(contexts_N), np.int32)
    if not len(contexts_N):
        return made_N
    order_N = np.argsort(contexts_N, kind="stable")  # in linear time up to 16 bits
    counts = np.bincount(contexts_N)
    present = np.flatnonzero(counts)
    ends = np.cumsum(counts[present]).tolist()
    sorted_N, parts, start = given_N[order_N], [], 0
    for context, end in zip(present.tolist(), ends, strict=True):
        parts.append(code(context, sorted_N[start:end]))
        start = end
    made_N[order_N] = np.concatenate(parts)
    return made_N


def coding_library() -> Any:
    """Return the package ``constriction``; raises StoreError where it is not installed."""
    try:
        return importlib.import_module("constriction")
    except ImportError as error:
        raise StoreError(MISSING) from error
