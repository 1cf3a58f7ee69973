"""What a worker asks of a machine: GPUs by the engine's options, a share of the cores, memory."""

import json
from pathlib import Path
from typing import Literal

import pytest

from pipeline.executors.ray_cluster.worker_size import (
    PROCESS_BYTES,
    Machine,
    WorkerSize,
)
from stages.models.spec import EngineOptions, ModelSpec
from stages.stage import StageContext

GIB = 1 << 30
GPU_NODE: Machine = {"GPU": 8.0, "CPU": 64.0, "memory": 512.0 * GIB}
CPU_NODE: Machine = {"CPU": 16.0, "memory": 8.0 * GIB}


def size_of(
    options: dict[str, object], workers: int, machines: list[Machine], *models: ModelSpec
) -> WorkerSize:
    engine = EngineOptions.model_validate(options)
    specs = {str(number): spec for number, spec in enumerate(models)}
    return WorkerSize.of(StageContext(Path(), 512, specs, engine), workers, machines)


@pytest.mark.parametrize(
    ("options", "workers", "machines", "expected"),
    [
        ({}, 2, [CPU_NODE], (0, 8)),
        ({}, 3, [CPU_NODE, CPU_NODE], (0, 8)),  # two of them share a machine
        ({}, 40, [CPU_NODE], (0, 1)),
        ({"num_threads": 3}, 2, [CPU_NODE], (0, 3)),
        ({}, 8, [CPU_NODE, GPU_NODE], (1, 8)),  # the machine without GPUs takes none
        ({"tensor_parallel_size": 4}, 2, [GPU_NODE], (4, 32)),
        ({"device": "cpu"}, 2, [GPU_NODE], (0, 32)),
        ({"device": "cuda", "tensor_parallel_size": 2}, 1, [CPU_NODE], (2, 1)),
        ({}, 1, [], (0, 1)),
    ],
)
def test_sizes(
    options: dict[str, object], workers: int, machines: list[Machine], expected: tuple[int, int]
) -> None:
    size = size_of(options, workers, machines)
    assert (size.num_gpus, size.num_cpus, size.num_bytes) == (*expected, PROCESS_BYTES)


@pytest.mark.parametrize(
    ("engine", "options", "cache"),
    [
        ("transformers", {}, 0),
        ("vllm", {}, 2 * GIB),
        ("vllm", {"kv_cache_memory_bytes": GIB}, GIB),
    ],
)
def test_memory_without_a_gpu_is_that_of_each_model(
    tmp_path: Path,
    engine: Literal["vllm", "transformers"],
    options: dict[str, object],
    cache: int,
) -> None:
    """Weights kept in two bytes take four as float32; on a GPU they are not in this memory."""
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    for part in (1, 2):
        (tmp_path / f"model-{part}.safetensors").write_bytes(bytes(500))
    wide, narrow = (ModelSpec(tmp_path, kind, engine, 32) for kind in ("float32", "bfloat16"))
    size = size_of(options, 1, [CPU_NODE], wide, narrow)
    assert size.num_bytes == PROCESS_BYTES + 2000 + 1000 + 2 * cache
    assert size_of(options, 1, [GPU_NODE], wide, narrow).num_bytes == PROCESS_BYTES


def test_a_refusal_says_what_was_asked_and_what_there_is() -> None:
    size = WorkerSize(num_gpus=2, num_cpus=4, num_bytes=9 * GIB)
    assert size.fits(GPU_NODE) and not size.fits(CPU_NODE)
    assert WorkerSize(0, 16, 8 * GIB).fits(CPU_NODE)
    assert not WorkerSize(0, 17, 0).fits(CPU_NODE)
    assert not WorkerSize(0, 1, 9 * GIB).fits(CPU_NODE)
    said = size.refusal([CPU_NODE, GPU_NODE], "none has been for 5 s")
    assert "each takes 2 GPUs, 4 CPUs and 9.0 GiB of one machine, none has been for 5 s; " in said
    assert "machines have 0 GPUs, 16 CPUs and 8.0 GiB; 8 GPUs, 64 CPUs and 512.0 GiB: lo" in said
    assert "machines have nothing: lower" in size.refusal([], "-")
