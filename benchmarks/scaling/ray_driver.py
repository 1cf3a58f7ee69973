"""What handing out a shard on Ray costs the driver, for as many workers as there may be.

Crew, dispatcher and messages are the real ones. The workers are calls that wait in one process of
Ray (an asynchronous actor), as no machine here has room for a thousand, and all answer when the
last of them has been given a shard: so the driver always has somebody to serve, as it has when a
run waits for it. Processor seconds of all its threads, Ray's among them.
"""

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.scaling.burn_stage import VOCAB_SIZE, BurnStage
from benchmarks.scaling.scale_costs import step_tasks
from benchmarks.scaling.simulated_crew import record_of, unheard
from pipeline.executors.dispatch import Limits, dispatch
from pipeline.executors.worker import Job, Versions
from schemas.storage.records import ShardRecord
from stages.stage import StageContext


def ray_driver_cost(workers: int, num_rounds: int) -> float:
    """Return the driver's processor seconds a shard; each worker does ``num_rounds`` of them."""
    from pipeline.executors.ray_cluster.connection import connected, head_of
    from pipeline.executors.ray_cluster.shards import _ActorCrew, _Member
    from pipeline.executors.ray_cluster.worker_size import WorkerSize

    # isort: split
    import ray

    class Crowd(_ActorCrew):
        """Workers that are all one actor."""

        actor: Any

        def start(self) -> int:
            self._num_started += 1
            self._members[self._num_started] = _Member(
                self.actor, None, self.actor.versions.remote()
            )
            return self._num_started

        def end(self, worker: int) -> None:
            del self._members[worker]

    with tempfile.TemporaryDirectory() as name, connected(None, Path(name), num_cpus=1):
        context = StageContext(Path(name), VOCAB_SIZE)
        crew = Crowd(BurnStage(rounds=0), context, WorkerSize(0, 0, 0), 300.0, head_of(None))
        everybody = ray.remote(num_cpus=0, max_concurrency=2 * workers)(_Everybody)
        crew.actor = everybody.remote(workers)
        tasks = step_tasks(workers * num_rounds)
        records = dispatch(crew, tasks, Limits(workers, 3, None), warned=unheard)
        for _ in range(workers):  # the first round has the start of the workers in it
            next(records)
        started = time.process_time()
        num_counted = sum(1 for _ in records)
        return (time.process_time() - started) / num_counted


class _Everybody:
    """Answers for all workers at once."""

    def __init__(self, workers: int) -> None:
        self.workers, self.num_waiting = workers, 0
        self.all_are_there = asyncio.Event()

    async def versions(self) -> tuple[Versions, str]:
        return Versions.installed(), "here"

    async def load(self, *_: Any) -> None:
        pass

    async def do(self, job: Job) -> ShardRecord:
        self.num_waiting += 1
        there = self.all_are_there
        if self.num_waiting == self.workers:
            self.num_waiting, self.all_are_there = 0, asyncio.Event()
            there.set()
        await there.wait()
        return record_of(job.task)

    async def close(self) -> None:
        pass
