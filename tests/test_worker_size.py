"""What a worker asks of a machine: GPUs by the engine's options, its share of the cores."""

import pytest

from pipeline.worker_size import Machine, WorkerSize
from stages.engines.options import EngineOptions

GPU_NODE: Machine = {"GPU": 8.0, "CPU": 64.0}
CPU_NODE: Machine = {"CPU": 16.0}


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
    size = WorkerSize.of(EngineOptions.model_validate(options), workers, machines)
    assert (size.num_gpus, size.num_cpus) == expected


def test_a_refusal_says_what_was_asked_and_what_there_is() -> None:
    size = WorkerSize(num_gpus=2, num_cpus=4)
    assert size.fits(GPU_NODE) and not size.fits(CPU_NODE)
    assert not WorkerSize(0, 17).fits(CPU_NODE)
    said = size.refusal([CPU_NODE, GPU_NODE], "none has been for 5 s")
    assert "each takes 2 GPUs and 4 CPUs of one machine, none has been for 5 s; " in said
    assert "machines have 0 GPUs and 16 CPUs; 8 GPUs and 64 CPUs: lower" in said
    assert "machines have nothing: lower" in size.refusal([], "-")
