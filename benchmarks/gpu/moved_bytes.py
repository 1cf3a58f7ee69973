"""How many bytes a function reads and writes, counted operation by operation.

Every operation that makes no view reads its tensors once and writes its result once; of one that
picks by index the index and what is picked count. Nothing is known of caches, so this says how
often memory is passed over and not how long it takes.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PICKS = ("gather", "scatter", "index", "searchsorted")
_FREE = ("empty", "new_empty", "detach", "_unsafe_view")


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(_FREE):
            return result
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name.startswith(_PICKS):  # all tensors but the one that is picked from, or put into
            read = read[1:]
            written = read[-1:] if func._schema.is_mutable or "scatter" in name else written
        self.total += sum(tensor.nbytes for tensor in (*read, *written))
        return result


def moved_bytes(work: Callable[[], object]) -> int:
    """Return the bytes that one run reads and writes."""
    counter: Any = _Counter()  # type: ignore[no-untyped-call]
    with counter:
        work()
    total: int = counter.total
    return total
