"""Whether what is to be made fits: bytes on the disk of the root, weights into the memory."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.planning.fingerprint import hidden_size_of, vocab_size_of
from pipeline.planning.plan import Model, PlannedStep
from pipeline.planning.recipe import Execution
from pipeline.state.step_state import is_done, progress_of
from schemas.errors import ConfigError, StoreError
from schemas.storage.files import Folder
from schemas.storage.object_path import ObjectPath
from stages.models.available_memory import available_memory
from stages.stage import TableStage

OVERRIDE = "--no-fit-check"
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class Memory:
    """What one device, or the machine, has free; ``device`` says which in words."""

    device: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """What a worker holds of a model: its weights, our head, and the cache of keys and values.

    ``cache_bytes`` is what vLLM is told to set aside, 0 where it takes what is left.
    """

    name: str
    weight_bytes: int
    head_bytes: int
    cache_bytes: int

    @property
    def least_bytes(self) -> int:
        """What has to fit: a cache takes what is left."""
        return self.weight_bytes + self.head_bytes


def require_fit(plan: Sequence[PlannedStep], execution: Execution) -> None:
    """Refuse, in one line, a run whose known bytes or models have no room.

    Raises StoreError for a disk, ConfigError for a memory.
    """
    require_disk(plan, execution.root)
    if execution.executor == "local":  # a cluster's machines are not this one
        for step in plan:
            require_memory(step, execution)


def require_disk(steps: Iterable[PlannedStep], root: Folder) -> None:
    """Refuse steps whose bytes, as far as known and not there yet, are more than is free."""
    if isinstance(root, ObjectPath):  # a store has no end
        return
    left = {step.name: left_bytes(step) for step in steps}
    needed, free = sum(left.values()), free_disk(root)
    if free is not None and needed > free:
        names = [name for name, size in left.items() if size]
        what = f"step '{names[0]}' needs" if len(names) == 1 else f"steps {', '.join(names)} need"
        raise StoreError(
            f"{what} about {needed / 1e6:,.1f} MB in {root}, only {free / 1e6:,.1f} MB are free: "
            f"free some, move execution.root, or run with {OVERRIDE}"
        )


def require_memory(step: PlannedStep, execution: Execution) -> None:
    """Refuse a step whose model is more than the memory that is free for each worker."""
    if not isinstance(step.stage, TableStage) or not step.models:
        return
    there = [model for model in step.models.items() if (model[1].base / "config.json").is_file()]
    if not there or is_done(step):
        return
    memory = free_memory(execution)
    if memory is None:
        return
    largest = max(
        (model_memory(name, model, execution) for name, model in there),
        key=lambda found: found.least_bytes,
    )
    workers = 1 if memory.device.startswith("GPU") else execution.workers
    if largest.least_bytes * workers > memory.free_bytes:
        each = f", in each of {workers} workers" if workers > 1 else ""
        raise ConfigError(
            f"steps.{step.name}: model '{largest.name}' needs about "
            f"{largest.least_bytes / 1e9:,.1f} GB of memory for weights and head{each}, only "
            f"{memory.free_bytes / 1e9:,.1f} GB of {memory.device} are free: free some, take "
            f"fewer workers or a smaller model, or run with {OVERRIDE}"
        )


def left_bytes(step: PlannedStep) -> int:
    """Return the bytes of a step that are not written yet, 0 where they are not known."""
    progress = progress_of(step)
    if progress.state == "done" or progress.num_bytes is None or not progress.num_shards:
        return 0
    return round(progress.num_bytes * (1 - progress.shards_done / progress.num_shards))


def free_disk(root: Folder) -> int | None:
    """Return what is free where a folder is, or would be made; None for a store."""
    if isinstance(root, ObjectPath):
        return None
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free


def model_memory(name: str, model: Model, execution: Execution) -> ModelMemory:
    """Return what one device of a worker holds of a model whose folder is there."""
    item = _ITEM_BYTES[model.dtype]
    devices = execution.engine.num_devices if model.engine == "vllm" else 1
    head = vocab_size_of(model.base) * hidden_size_of(model.base) * item
    cache = 0
    if model.engine == "vllm":
        on_gpu = bool(devices_of(execution))
        engine = execution.engine
        cache = (engine.kv_cache_memory_bytes or 0) if on_gpu else engine.cache_bytes
    return ModelMemory(name, num_parameters(model.base) * item // devices, head, cache)


def num_parameters(folder: Folder) -> int:
    """Return how many numbers the weight files of a model folder hold, by their size."""
    if not isinstance(folder, Path):
        return 0
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    stored = _ITEM_BYTES.get(_stored_dtype(folder), 2)
    return sum(file.stat().st_size for file in files) // stored


def _stored_dtype(folder: Path) -> str:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    texts = [config, config.get("text_config") or {}]
    found = [text.get(key) for text in texts for key in ("dtype", "torch_dtype")]
    return next((dtype for dtype in found if isinstance(dtype, str)), "float16")


def free_memory(execution: Execution) -> Memory | None:
    """Return the memory that a worker's model goes into; None where the system does not say."""
    if devices := devices_of(execution):
        return max(devices, key=lambda device: device.free_bytes)
    free = available_memory()
    return Memory("this machine's memory", free, free) if free else None


def devices_of(execution: Execution) -> list[Memory]:
    """Return the GPUs that this process may use; asking takes nothing of them."""
    if execution.engine.device == "cpu" or shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,name,memory.free,memory.total"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = [] if visible is None else ["-i", visible]
    if visible == "":
        return []
    try:
        said = subprocess.run(
            [*query, "--format=csv,noheader,nounits", *chosen],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line]
        return [
            Memory(f"GPU {index} ({name})", int(free) << 20, int(total) << 20)
            for index, name, free, total in rows
        ]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
