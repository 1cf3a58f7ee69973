"""Run a stage's shards on this machine: in this process, or in several that each load it once.

Work is handed out one shard at a time, so a slow shard holds nobody up, and a killed run loses at
most the shard in hand of each worker.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any

from pipeline.shard_task import ShardTask, run_shard
from schemas.errors import EngineError, TeacherCacheError
from schemas.manifest import ShardRecord
from stages.stage import StageContext, TableStage, Work


def run_local(
    stage: TableStage, context: StageContext, tasks: Sequence[ShardTask], *, workers: int
) -> Iterator[ShardRecord]:
    """Yield each shard's record as it is finished."""
    if workers == 1 or not tasks:
        with stage.open(context) as work:
            bound = stage.bind(context)
            for task in tasks:
                yield run_shard(task, bound, work)
    else:
        yield from _run_in_processes(stage, context, tasks, workers=workers)


def _run_in_processes(
    stage: TableStage, context: StageContext, tasks: Sequence[ShardTask], *, workers: int
) -> Iterator[ShardRecord]:
    pool = ProcessPoolExecutor(
        max_workers=min(workers, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),  # a forked engine cannot start
        initializer=_start_worker,
        initargs=(stage, context),
    )
    try:
        for future in as_completed([pool.submit(_run_one, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise EngineError(
            "a worker process died (out of memory, or the engine crashed); finished shards are "
            "kept: lower execution.workers if memory is short, and run again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """What one worker process holds: set once by the pool's initializer."""

    stack = ExitStack()
    work: Work
    bound: Any
    failure: TeacherCacheError | None = None


def _start_worker(stage: TableStage, context: StageContext) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all: the run alone says so
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _Worker.work = _Worker.stack.enter_context(stage.open(context))
        _Worker.bound = stage.bind(context)
    except TeacherCacheError as error:  # raised here, it would reach the user as a dead process
        _Worker.failure = error


def _end_with_parent() -> None:
    """End this worker when a run is killed; it would hold its model, idle, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_one(task: ShardTask) -> ShardRecord:
    if _Worker.failure is not None:
        raise _Worker.failure
    return run_shard(task, _Worker.bound, _Worker.work)
