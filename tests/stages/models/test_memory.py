"""Memory that waits for its use: zeros that the system gives as they are written."""

import re
from pathlib import Path

import pytest
import torch

from stages.models.engines.memory import UntouchedZeros
from stages.models.spec import EngineOptions

MIB = 1 << 20
# What the rest of the process may take or give back meanwhile.
OTHERS = 64 * MIB


def resident() -> int:
    """Return this process's own bytes that lie in memory, files left out."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def test_bytes_are_taken_as_they_are_written() -> None:
    start = resident()
    with UntouchedZeros():
        cache = torch.zeros(512 * MIB, dtype=torch.int8, device="cpu")
    assert resident() - start < OTHERS
    assert not cache.any() and cache.data_ptr() % 4096 == 0
    assert resident() - start < OTHERS, "reading zeros takes none"
    cache[: 128 * MIB].view(torch.float32).fill_(1.5)
    assert abs(resident() - start - 128 * MIB) < OTHERS
    assert cache.view(torch.float32).double().sum() == 1.5 * 32 * MIB
    del cache
    assert resident() - start < OTHERS, "freed with the tensor"


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((4 * MIB,), torch.float32), ((2, 2 * MIB), torch.int8), ((8,), torch.int8)],
)
def test_other_zeros_are_those_of_torch(size: tuple[int, ...], dtype: torch.dtype) -> None:
    with UntouchedZeros():
        zeros, ones = torch.zeros(*size, dtype=dtype), torch.ones(3)
        meta = torch.zeros(4 * MIB, dtype=torch.int8, device="meta")
    assert (zeros.shape, zeros.dtype) == (size, dtype) and not zeros.any()
    assert ones.sum() == 3 and meta.is_meta
    assert zeros.resize_(0).numel() == 0, "of torch's own memory, which can be resized"


def test_one_place_says_how_much_is_set_aside() -> None:
    assert EngineOptions().cache_bytes == 2 << 30
    assert EngineOptions(kv_cache_memory_bytes=64 * MIB).cache_bytes == 64 * MIB
