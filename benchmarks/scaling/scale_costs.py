"""What one process has to do for each shard of a run, measured: hand it out, list it, check it.

Processor seconds, so that other work on the machine matters little.
"""

import hashlib
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling.simulated_crew import SimulatedCrew, VirtualClock, World, unheard
from benchmarks.scaling.synthetic_shards import synthetic_shards
from pipeline.executors.dispatch import Limits, dispatch
from pipeline.executors.shard_task import StepTasks
from pipeline.state.kept_shards import kept_shards
from schemas.storage.records import ShardRecord, shard_name, write_record
from schemas.storage.shard_list import ShardList, ShardListBuilder


@dataclass(frozen=True, slots=True)
class Driver:
    """What the driver does for one shard, in seconds by number of workers, measured."""

    dispatch_s: dict[int, float]  # the dispatcher alone
    on_ray_s: dict[int, float]  # all of it, on Ray


def step_tasks(num_shards: int) -> StepTasks:
    """Return the tasks of a step whose input has ``num_shards`` shards."""
    shards, folder = synthetic_shards(num_shards), Path("out")
    return StepTasks(folder, range(num_shards), Path("in"), shards, 0.0, {"fingerprint": "f" * 64})


def dispatch_cost(workers: int, num_shards: int) -> float:
    """Return the dispatcher's own seconds a shard: its run less the crew's part of it."""
    world = World(shard_s=50.0, relative_S=np.linspace(0.8, 1.2, 101))
    clock = VirtualClock()
    crew = _TimedCrew(world, clock)
    limits = Limits(workers, max_attempts=3, shard_timeout_s=86_400.0)
    tasks = step_tasks(num_shards)
    started = time.process_time()
    for _ in dispatch(crew, tasks, limits, warned=unheard, clock=clock, files=crew):
        pass
    return (time.process_time() - started - crew.own_s) / num_shards


class _TimedCrew(SimulatedCrew):
    """Counts its own time, to be taken off."""

    own_s = 0.0

    def give(self, worker: int, job: Any) -> None:
        started = time.process_time()
        super().give(worker, job)
        self.own_s += time.process_time() - started

    def wait(self, timeout_s: float | None) -> Any:
        started = time.process_time()
        events = super().wait(timeout_s)
        self.own_s += time.process_time() - started
        return events


def dispatch_memory(workers: int, num_shards: int) -> float:
    """Return the most that dispatching allocates at a time, in bytes, its task list included."""
    world = World(shard_s=50.0, relative_S=np.linspace(0.8, 1.2, 101))
    clock = VirtualClock()
    tasks = step_tasks(num_shards)
    limits = Limits(workers, max_attempts=3, shard_timeout_s=None)
    tracemalloc.start()
    crew = SimulatedCrew(world, clock)
    for _ in dispatch(crew, tasks, limits, warned=unheard, clock=clock, files=crew):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def list_costs(num_shards: int) -> dict[str, float]:
    """Return what the list of shards takes: bytes, and seconds to build, write, read and walk."""
    shards = synthetic_shards(num_shards)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_s = seconds_of(lambda: shards.write(folder))
        size = (folder / "shards.feather").stat().st_size
        again = ShardList.in_folder(folder, shards.totals)
        read_s = seconds_of(lambda: again.table)
        builder = ShardListBuilder()

        def walk() -> None:
            for index, record in enumerate(again):
                builder.add(index, record)

        build_s = seconds_of(walk) + seconds_of(builder.finish)
    return {
        "shards": float(num_shards),
        "bytes a shard": size / num_shards,
        "write, s": write_s,
        "read and check, s": read_s,
        "walk through and build again, s": build_s,
    }


def resume_costs(num_records: int, num_bytes: int) -> dict[str, float]:
    """Return what a resumed run does for each finished shard: its record read, its bytes hashed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "content").write_bytes(b"x" * 100)
        digest = hashlib.sha256(b"x" * 100).hexdigest()
        for index in range(num_records):
            record = ShardRecord(
                name=shard_name(index, num_records),
                split="train",
                num_rows=1,
                num_tokens=1,
                num_positions=1,
                num_bytes=100,
                sha256=digest,
            )
            os.link(folder / "content", folder / record.file)
            write_record(folder, record, {"versions": {str(i): "1.2.3" for i in range(8)}})
        started = time.process_time()
        with kept_shards(folder, num_records, range(num_records)) as kept:
            record_s = (time.process_time() - started) / num_records
            assert kept.num_kept == num_records and not kept.changed()
    block = np.random.default_rng(0).bytes(num_bytes)
    hash_s = seconds_of(lambda: hashlib.sha256(block).digest())
    return {"record, us": 1e6 * record_s, "hash, GB/s a core": num_bytes / hash_s / 1e9}


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
