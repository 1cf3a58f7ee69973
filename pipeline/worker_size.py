"""What one worker takes of a machine of a cluster, and what to say when no machine has it.

GPUs: ``tensor_parallel_size`` of one machine; none with ``engine.device: cpu``, nor with ``auto``
on a cluster without GPUs. Cores: ``engine.num_threads``, or a share of the machine's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.engines.options import EngineOptions

Machine = Mapping[str, float]  # resources by Ray's names


@dataclass(frozen=True, slots=True)
class WorkerSize:
    """GPUs and CPUs, all of one machine."""

    num_gpus: int
    num_cpus: int

    @classmethod
    def of(cls, options: EngineOptions, workers: int, machines: Sequence[Machine]) -> "WorkerSize":
        """Return the size with which ``workers`` workers fit these machines, if they can."""
        has_gpus = any(_count(machine, "GPU") for machine in machines)
        is_gpu_work = options.device == "cuda" or (options.device == "auto" and has_gpus)
        num_gpus = options.tensor_parallel_size if is_gpu_work else 0
        if options.num_threads is not None:
            return cls(num_gpus, options.num_threads)
        cores = [_count(m, "CPU") for m in machines if _count(m, "GPU") >= num_gpus]
        each = math.ceil(workers / max(1, len(cores)))
        return cls(num_gpus, max(1, min(cores, default=1) // each))

    def fits(self, machine: Machine) -> bool:
        """Whether a machine would hold one worker were it empty."""
        return _count(machine, "GPU") >= self.num_gpus and _count(machine, "CPU") >= self.num_cpus

    def refusal(self, machines: Sequence[Machine], why: str) -> str:
        """Say what was asked for and what there is."""
        sizes = [f"{_count(m, 'GPU')} GPUs and {_count(m, 'CPU')} CPUs" for m in machines]
        return (
            f"no worker can be placed: each takes {self.num_gpus} GPUs and {self.num_cpus} CPUs of "
            f"one machine, {why}; the cluster's machines have {'; '.join(sizes) or 'nothing'}: "
            f"lower execution.engine.tensor_parallel_size or num_threads, set engine.device to "
            f"cpu, or use a larger cluster"
        )


def _count(machine: Machine, name: str) -> int:
    return int(machine.get(name, 0))
