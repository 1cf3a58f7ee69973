"""The device that is measured: its clock, its memory, its bandwidth, and what it is called.

On a GPU times are between two events of its own stream, each run on its own, after a warm-up; on a
CPU, where only the script is tried out, they are wall time and no memory is measured.
"""

import contextlib
import gc
import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP, LEAST, MOST = 2, 3, 20  # runs: not measured; measured at the least and at the most
SECONDS = 3.0  # spent on one measurement beyond the least

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one run: the median, and how far the runs lay apart."""

    median: float
    lowest: float
    highest: float
    runs: int

    def row(self) -> dict[str, Any]:
        """Return the columns of a table."""
        return {
            "ms": 1e3 * self.median,
            "lowest ms": 1e3 * self.lowest,
            "highest ms": 1e3 * self.highest,
            "runs": self.runs,
        }


@dataclass(frozen=True, slots=True)
class Card:
    """One device."""

    device: torch.device

    @property
    def is_gpu(self) -> bool:
        """Whether times and memory mean anything."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for all work given to the device."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def timed(self, work: Work, *, before: Work | None = None) -> Times:
        """Run ``work`` several times; ``before`` each run, outside its time, ``before`` is run."""
        seconds = []
        began = time.monotonic()
        for number in range(WARM_UP + (MOST if self.is_gpu else LEAST)):
            if before is not None:
                before()
            self.synchronize()
            last = self._once(work)
            if number >= WARM_UP:
                seconds.append(last)
            if len(seconds) >= LEAST and time.monotonic() - began > SECONDS:
                break
        return Times(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def _once(self, work: Work) -> float:
        if not self.is_gpu:
            clock = time.perf_counter()
            work()
            return time.perf_counter() - clock
        event: Any = torch.cuda.Event  # untyped in torch
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) / 1e3

    def held_bytes(self) -> int:
        """Return what tensors hold now."""
        return torch.cuda.memory_allocated(self.device) if self.is_gpu else 0

    def peak_bytes(self, work: Work) -> int | None:
        """Return the most that tensors held in one run of ``work``, whatever was there before."""
        if not self.is_gpu:
            return None
        self.free()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)

    def bandwidth(self, num_bytes: int) -> float:
        """Return bytes a second: a float32 block of that size summed, or copied, if that is more.

        A sum reads every byte once, a copy reads and writes it.
        """
        block = torch.ones(num_bytes // 4, device=self.device)
        other = torch.empty_like(block)
        read = block.nbytes / self.timed(block.sum).median
        copied = 2 * block.nbytes / self.timed(lambda: other.copy_(block)).median
        return max(read, copied)

    def describe(self) -> dict[str, str]:
        """Return the names of what is measured and of what measures."""
        versions = {}
        for package in ("torch", "transformers", "triton", "liger-kernel", "veomni"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        if not self.is_gpu:
            return {"card": "none: a CPU, whose times mean nothing here", **versions}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "card": str(properties.name),
            "memory": f"{properties.total_memory / 1e9:.0f} GB",
            "driver": _driver(),
            "CUDA": str(torch.version.cuda),
            **versions,
        }


def open_card(name: str) -> Card:
    """Return the device; exits with one line where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no NVIDIA GPU, so nothing is measured: run it on a "
            f"machine with one, or with --device cpu --quick, which tries the script out"
        )
    # Products of float32 stay float32: what is compared with float64 must not be TF32.
    torch.backends.cuda.matmul.allow_tf32 = False
    return Card(torch.device(name))


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return answer.stdout.splitlines()[0].strip()
