"""What a model takes of a machine's memory, what is free, and memory that waits for its use."""

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


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take, 0 where the system does not say.

    That is Linux's own estimate, and no more than the container's limit leaves (version 2 of
    control groups; files that it holds in memory can be dropped and count as free).
    """
    system = _numbers(root / "proc/meminfo").get("MemAvailable:", 0) << 10
    group = root / "sys/fs/cgroup"
    limit, used = group / "memory.max", group / "memory.current"
    if not limit.is_file() or not used.is_file() or not limit.read_text().strip().isdigit():
        return system
    droppable = _numbers(group / "memory.stat").get("inactive_file", 0)
    return min(system, int(limit.read_text()) - int(used.read_text()) + droppable)


def _numbers(file: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    if not file.is_file():
        return {}
    words = (line.split() for line in file.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) > 1}
