"""What a model takes of a machine's memory, and memory that waits for its use."""

import ctypes
import gc
import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stages.models.causal_lm.language_head import read_config

_LARGE_BYTES = 1 << 20


class UntouchedZeros(TorchFunctionMode):
    """While entered, a large ``torch.zeros`` of bytes on the CPU takes memory as it is written.

    torch writes its zeros, and so takes all of them at once; the system's own pages read as zeros
    and are taken when something is written to them first. So vLLM sets its cache of keys and values
    aside: where prefixes are not kept, it gives out the blocks that came back last, and a table
    touches as many as one batch and the longest row need.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Take the place of ``torch.zeros(size, dtype=torch.int8)``, and of nothing else."""
        named = dict(kwargs or {})
        of_bytes = func is torch.zeros and named.get("dtype") == torch.int8
        if of_bytes and named.get("device") in (None, "cpu", torch.device("cpu")):
            match args:
                case (int(num_bytes),) if num_bytes >= _LARGE_BYTES:
                    return _untouched(num_bytes)
        return func(*args, **named)


def _untouched(num_bytes: int) -> Tensor:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.int8)


def give_back() -> None:
    """Give the system the pages that this process has freed, where its C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Return what a model folder's weight files come to in the dtype that the model is run in."""
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    stored = getattr(read_config(folder).get_text_config(), "dtype", None) or torch.float16
    return sum(file.stat().st_size for file in files) * dtype.itemsize // stored.itemsize
