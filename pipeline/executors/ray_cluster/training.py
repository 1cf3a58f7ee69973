"""Carry out a training step on a Ray cluster: Ray Train places the processes and joins them up.

Each worker runs the same job as everywhere else. Checkpoints are the trainer's own, in the step's
folder, which every node has to reach; so a run that lost a worker goes on here, or on one machine.
With a root in an object store all workers are placed on one machine, which works in a folder of its
own.
"""

import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.executors.ray_cluster.connection import connected

# isort: split
import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from pipeline.executors.training_job import OnEvent, TrainingJob
from pipeline.state.working_folder import working_folder
from schemas.errors import ConfigError, EngineError, TeacherCacheError
from schemas.storage.object_path import ObjectPath

NOTES = ".ray"  # what Ray Train keeps of a run while it lasts


def train_on_ray(
    job: TrainingJob, num_processes: int, on_event: OnEvent, *, address: str | None
) -> None:
    """Train on ``num_processes`` workers, one GPU each where the cluster has GPUs.

    ``address`` None starts a Ray for this step. ``on_event`` is called in another thread, while
    this one waits. Raises the error that a worker raised, ConfigError for a cluster that is too
    small, and EngineError when a worker died or no cluster answers.
    """
    folder = working_folder(job.output)
    cores = max(os.cpu_count() or 1, num_processes)
    with connected(address, folder, num_cpus=cores):
        _train(job, folder / NOTES, num_processes, on_event)


def _train(job: TrainingJob, notes: Path, num_processes: int, on_event: OnEvent) -> None:
    use_gpu = _use_gpu(num_processes)
    # Of a step in an object store, each machine has its own working folder.
    placement = "STRICT_PACK" if isinstance(job.output, ObjectPath) else "PACK"
    queue = Queue(actor_options={"num_cpus": 0})
    errors: list[TeacherCacheError] = []
    reader = threading.Thread(target=_listen, args=(queue, on_event, errors))
    reader.start()
    trainer = TorchTrainer(
        _carry_out,
        train_loop_config={"job": job, "queue": queue},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_processes, use_gpu=use_gpu, placement_strategy=placement
        ),
        run_config=RunConfig(storage_path=str(notes), failure_config=FailureConfig(max_failures=0)),
    )
    failure: TrainingFailedError | None = None
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failure = error
    finally:
        with suppress(RayActorError):  # the queue has died with its node: so has the reader
            queue.put(None)
        reader.join()
        queue.shutdown()
        shutil.rmtree(notes, ignore_errors=True)
    if errors:
        raise errors[0]
    if failure is not None:
        _raise(failure)


def _use_gpu(num_processes: int) -> bool:
    found = ray.cluster_resources()
    kind = "GPU" if found.get("GPU", 0) else "CPU"
    if found.get(kind, 0) < num_processes:
        raise ConfigError(
            f"training_processes is {num_processes}, the Ray cluster has {found.get(kind, 0):g} "
            f"{kind}s and a process takes one: ask for fewer processes or a larger cluster"
        )
    return kind == "GPU"


def _carry_out(config: dict[str, Any]) -> None:
    """Run one worker's part; the queue outlives it."""
    say = config["queue"].put
    try:
        config["job"].carry_out(say)
    except TeacherCacheError as error:
        say(error)
        raise


def _listen(queue: Queue, on_event: OnEvent, errors: list[TeacherCacheError]) -> None:
    with suppress(RayActorError):
        while (message := queue.get()) is not None:
            if isinstance(message, dict):
                on_event(message)
            else:
                errors.append(message)


def _raise(failure: TrainingFailedError) -> None:
    """Raise what ended the workers: the others lose their partner and fail because of it."""
    failures = failure.worker_failures if isinstance(failure, WorkerGroupError) else {}
    causes = {  # a lost worker's error is that of the look after its health
        rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()
    }
    died = [rank for rank, cause in causes.items() if isinstance(cause, RayActorError)]
    if not died:
        raise failure
    raise EngineError(
        f"training worker {died[0]} of the Ray cluster died: the last whole checkpoint is kept, "
        f"run again to go on from it"
    ) from failure
