"""Run a stage's shards on this machine: in this process, or in several that each load it once.

Work is handed out one shard at a time, so a slow shard holds nobody up, and a killed run loses at
most the shard in hand of each worker. Of several workers, one that dies costs the shard it had in
hand; with one, the run is the worker, and dies with it: then two are in hand, one that is worked on
and the one before it, which is being written.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from pipeline.executors.dispatch import Done, Event, Failed, Limits, Lost, Ready, dispatch
from pipeline.executors.shard_task import ShardTasks
from pipeline.executors.shard_work import run_shards
from pipeline.executors.worker import Do, Job, opened_worker
from schemas.errors import TeacherCacheError
from schemas.storage.records import ShardRecord
from stages.file_map import FileMapStage
from stages.stage import StageContext, TableStage

END_WITHIN_S = 20.0  # for an engine to free its device


def run_local(
    stage: TableStage | FileMapStage,
    context: StageContext,
    tasks: ShardTasks,
    limits: Limits,
    *,
    warned: Callable[[str], None],
) -> Iterator[ShardRecord]:
    """Yield each shard's record as it is finished."""
    if limits.workers == 1 or not tasks:
        with stage.open(context) as work:
            yield from run_shards(tasks, stage.bind(context), work, context.notes)
    else:
        crew = _ProcessCrew(stage, context)
        try:
            yield from dispatch(crew, tasks, limits, warned=warned)
        finally:
            crew.close()


@dataclass
class _Member:
    process: SpawnProcess
    connection: "Connection[Any, Any]"
    is_ready: bool = False
    is_busy: bool = False


class _ProcessCrew:
    """Processes of this machine, each at the other end of a pipe; see ``dispatch.Crew``."""

    def __init__(self, stage: TableStage | FileMapStage, context: StageContext) -> None:
        self.stage, self.context = stage, context
        self._members: dict[int, _Member] = {}
        self._num_started = 0

    def start(self) -> int:
        spawn = multiprocessing.get_context("spawn")  # a forked engine cannot start
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, self.stage, self.context))
        process.start()
        theirs.close()  # so that a dead worker is the end of the pipe
        self._num_started += 1
        self._members[self._num_started] = _Member(process, ours)
        return self._num_started

    def give(self, worker: int, job: Job) -> None:
        self._members[worker].is_busy = True
        with suppress(OSError):  # it has just died: the pipe says so next
            self._members[worker].connection.send(job)

    def wait(self, timeout_s: float | None) -> list[Event]:
        workers = {member.connection: worker for worker, member in self._members.items()}
        heard = wait(list(workers), timeout_s)
        return [self._event(worker) for pipe, worker in workers.items() if pipe in heard]

    def _event(self, worker: int) -> Event:
        member = self._members[worker]
        try:
            said = member.connection.recv()
        except (EOFError, OSError):
            member.process.join(END_WITHIN_S)
            return Lost(worker, _how_it_ended(member.process.exitcode))
        if isinstance(said, Exception):
            return Failed(worker, said)
        if not member.is_ready:
            member.is_ready = True
            return Ready(worker)
        member.is_busy = False
        return Done(worker, said)

    def end(self, worker: int) -> None:
        member = self._members.pop(worker)
        member.connection.close()
        try:  # all it started, too: an engine's own processes would keep the device
            os.killpg(member.process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:
            member.process.kill()
        member.process.join()

    def close(self) -> None:
        """Let workers without a job free their engines; end all others at once."""
        resting = [m for m in self._members.values() if m.is_ready and not m.is_busy]
        for member in resting:
            with suppress(OSError):
                member.connection.send(None)
        deadline = time.monotonic() + END_WITHIN_S
        for member in resting:
            member.process.join(max(0.0, deadline - time.monotonic()))
        for worker in list(self._members):
            self.end(worker)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"
    return f"its process ended with code {code}"


def _serve(
    connection: "Connection[Any, Any]", stage: TableStage | FileMapStage, context: StageContext
) -> None:
    """Be a worker: say that the stage is open, then answer each job until told to end."""
    os.setpgid(0, 0)  # Ctrl-C is the run's to answer, and a worker can be ended with all it started
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with opened_worker(stage, context) as do:
            connection.send(None)
            while (job := connection.recv()) is not None:
                connection.send(_answer(do, job))
    except Exception as error:  # noqa: BLE001  the run raises it
        connection.send(_portable(error))


def _answer(do: Do, job: Job) -> ShardRecord | Exception | None:
    try:
        return do(job)
    except Exception as error:  # noqa: BLE001  the run raises it
        return _portable(error)


def _portable(error: Exception) -> Exception:
    """Return an error that any process can unpickle; one that is not ours keeps its traceback."""
    if isinstance(error, TeacherCacheError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))


def _end_with_parent() -> None:
    """End this worker when a run is killed; it would hold its model, idle, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
