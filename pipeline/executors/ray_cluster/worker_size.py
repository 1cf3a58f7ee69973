"""What one worker takes of a machine of a cluster, and what to say when no machine has it.

GPUs: ``tensor_parallel_size * pipeline_parallel_size`` of one machine; none with ``engine.device:
cpu``, nor with ``auto`` on a cluster without GPUs. Cores: ``engine.num_threads``, or a share of the
machine's. Memory: what the libraries take and, without GPUs, the models' weights and vLLM's cache
of keys and values.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from schemas.storage.files import Folder
from schemas.storage.object_path import ObjectPath
from stages.models.spec import EngineOptions, ModelSpec
from stages.stage import StageContext

PROCESS_BYTES = 1 << 30  # torch, transformers and vLLM, loaded
WEIGHT_FILES = (".safetensors", ".bin")  # one or the other
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
Machine = Mapping[str, float]  # resources by Ray's names


@dataclass(frozen=True, slots=True)
class WorkerSize:
    """GPUs, CPUs and bytes of memory, all of one machine."""

    num_gpus: int
    num_cpus: int
    num_bytes: int

    @classmethod
    def of(cls, context: StageContext, workers: int, machines: Sequence[Machine]) -> "WorkerSize":
        """Return the size with which ``workers`` workers fit these machines, if they can."""
        options = context.engine
        has_gpus = any(_count(machine, "GPU") for machine in machines)
        is_gpu_work = options.device == "cuda" or (options.device == "auto" and has_gpus)
        num_gpus = options.num_devices if is_gpu_work else 0
        num_bytes = PROCESS_BYTES
        if not num_gpus:
            num_bytes += sum(_model_bytes(spec, options) for spec in context.models.values())
        if options.num_threads is not None:
            return cls(num_gpus, options.num_threads, num_bytes)
        cores = [_count(m, "CPU") for m in machines if _count(m, "GPU") >= num_gpus]
        each = math.ceil(workers / max(1, len(cores)))
        return cls(num_gpus, max(1, min(cores, default=1) // each), num_bytes)

    def fits(self, machine: Machine) -> bool:
        """Whether a machine would hold one worker were it empty."""
        return (
            _count(machine, "GPU") >= self.num_gpus
            and _count(machine, "CPU") >= self.num_cpus
            and _count(machine, "memory") >= self.num_bytes
        )

    def refusal(self, machines: Sequence[Machine], why: str) -> str:
        """Say what was asked for and what there is."""
        asked = _words(self.num_gpus, self.num_cpus, self.num_bytes)
        sizes = [_words(_count(m, "GPU"), _count(m, "CPU"), _count(m, "memory")) for m in machines]
        return (
            f"no worker can be placed: each takes {asked} of one machine, {why}; the cluster's "
            f"machines have {'; '.join(sizes) or 'nothing'}: lower "
            f"execution.engine.tensor_parallel_size, pipeline_parallel_size, num_threads or "
            f"kv_cache_memory_bytes, set engine.device to cpu, or use a larger cluster"
        )


def _model_bytes(spec: ModelSpec, options: EngineOptions) -> int:
    """Return what a model takes of a machine without GPUs: weights in its dtype, and cache."""
    sizes = _file_sizes(spec.base)
    kinds = ([n for name, n in sizes.items() if name.endswith(end)] for end in WEIGHT_FILES)
    config = json.loads((spec.base / "config.json").read_text())
    asked = WIDTHS[spec.dtype]
    stored = WIDTHS.get(config.get("dtype") or config.get("torch_dtype"), asked)
    weights: int = sum(next(filter(None, kinds), [])) * asked // stored
    if spec.engine != "vllm":
        return weights
    return weights + options.cache_bytes


def _file_sizes(folder: Folder) -> dict[str, int]:
    if isinstance(folder, ObjectPath):
        return {path.name: size for path, size in folder.find().items()}
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def _words(num_gpus: int, num_cpus: int, num_bytes: int) -> str:
    return f"{num_gpus} GPUs, {num_cpus} CPUs and {num_bytes / (1 << 30):.1f} GiB"


def _count(machine: Machine, name: str) -> int:
    return int(machine.get(name, 0))
