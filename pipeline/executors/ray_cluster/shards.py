"""Run a stage's shards on a Ray cluster: a pool of actors that each load the stage once.

Ray places the workers and tells when one is gone; ``dispatch`` decides what each of them does. An
actor is never restarted by Ray and a job never repeated by it: a row that ends its worker would be
tried for ever. A lost actor is killed before another is asked for, as it may hold on to what the
other needs, and nothing is given to an actor that is not placed: it might never be.

A worker runs in the step's folder with the variables of ``THREADS`` as the run itself has them, so
its sums are those of a worker of the local executor. All machines see ``execution.root`` under the
same path.
"""

import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from pipeline.executors.ray_cluster.connection import connected, first_line, head_of, refusal

# isort: split
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.executors.dispatch import Done, Event, Failed, Limits, Lost, Ready, dispatch
from pipeline.executors.ray_cluster.worker_size import Machine, WorkerSize
from pipeline.executors.shard_task import ShardTasks
from pipeline.executors.worker import Do, Job, Versions, opened_worker
from pipeline.state.working_folder import working_folder
from schemas.errors import ConfigError, EngineError, TeacherCacheError
from schemas.storage.records import ShardRecord
from stages.file_map import FileMapStage
from stages.stage import StageContext, TableStage

START_TIMEOUT_S = 300.0  # for the first worker to find a place; a cluster may have to grow
HEAD_TIMEOUT_S = 20.0  # without the head Ray waits for ever, or ends this process after 60 s
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # Ray would set the first to the worker's CPUs
POLL_S = 1.0


def run_on_ray(
    stage: TableStage | FileMapStage,
    context: StageContext,
    tasks: ShardTasks,
    limits: Limits,
    *,
    address: str | None,
    warned: Callable[[str], None],
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[ShardRecord]:
    """Yield each shard's record as it is finished; ``address`` None starts a Ray for this run."""
    cores = max(os.cpu_count() or 1, limits.workers * (context.engine.num_threads or 1))
    with connected(address, working_folder(context.folder), num_cpus=cores):
        machines = _machines()
        size = WorkerSize.of(context, limits.workers, machines)
        if address is None and not any(map(size.fits, machines)):
            raise EngineError(size.refusal(machines, "more than any machine has"))
        crew = _ActorCrew(stage, context, size, start_timeout_s, head_of(address))
        try:
            yield from dispatch(crew, tasks, limits, warned=warned)
        except ConnectionError as error:  # of a client; a worker's own comes as a RayTaskError
            if not isinstance(error, RayTaskError):
                raise crew.lost_head(error) from error
            raise
        finally:
            crew.close()


def _machines() -> list[Machine]:
    """Return the resources of each machine that takes work."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [found for found in resources if found.get("CPU")]


class _Actor:
    """One worker, in a process that Ray placed."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._do: Do | None = None

    def versions(self) -> tuple[Versions, str]:
        """Say what is installed here; asked first, before anything of the run is unpickled."""
        return Versions.installed(), socket.gethostname()

    def load(
        self,
        stage: TableStage | FileMapStage,
        context: StageContext,
        threads: dict[str, str | None],
    ) -> None:
        """Open the stage. ``threads`` are set before torch is imported, which reads them once."""
        for name, value in threads.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.chdir(working_folder(context.folder))
        self._do = self._stack.enter_context(opened_worker(stage, context))

    def do(self, job: Job) -> ShardRecord | None:
        """Do one job."""
        assert self._do is not None
        return self._do(job)

    def close(self) -> None:
        """Free the engine."""
        self._stack.close()


@dataclass
class _Member:
    actor: Any
    group: Any
    pending: Any  # the result waited for, None while it has nothing to do
    state: str = "placing"  # then loading, then ready


class _ActorCrew:
    """Actors, and what Ray says of them; see ``dispatch.Crew``."""

    def __init__(
        self,
        stage: TableStage | FileMapStage,
        context: StageContext,
        size: WorkerSize,
        start_timeout_s: float,
        head: str,
    ) -> None:
        self.stage, self.context, self.size = stage, _absolute(context), size
        self.start_timeout_s, self.head = start_timeout_s, head
        self._head_is_lost = False
        self._versions = Versions.installed()
        self._threads = {name: os.environ.get(name) for name in THREADS}
        self._members: dict[int, _Member] = {}
        self._num_started = 0
        self._last_placed = time.monotonic()

    def start(self) -> int:
        options: dict[str, Any] = {
            "num_gpus": self.size.num_gpus,
            "num_cpus": self.size.num_cpus,
            "memory": self.size.num_bytes,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        group = None
        if self.size.num_gpus > 1:
            bundle = {
                "GPU": self.size.num_gpus,
                "CPU": self.size.num_cpus,
                "memory": self.size.num_bytes,
            }
            group = placement_group([bundle], strategy="STRICT_PACK")
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, 0)
        actor = ray.remote(**options)(_Actor).remote()
        self._num_started += 1
        self._members[self._num_started] = _Member(actor, group, actor.versions.remote())
        return self._num_started

    def give(self, worker: int, job: Job) -> None:
        member = self._members[worker]
        member.pending = member.actor.do.remote(job)

    def wait(self, timeout_s: float | None) -> list[Event]:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._require_place()
            waiting = {m.pending: n for n, m in self._members.items() if m.pending is not None}
            left_s = max(0.0, min(POLL_S, deadline - time.monotonic()))
            done, rest = ray.wait(list(waiting), timeout=left_s)
            if not done:
                self._require_head()
            elif rest:  # all that are there by now: asking costs as much for one as for a hundred
                done += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
            events = [self._event(waiting[ref]) for ref in done]
            heard = [event for event in events if event is not None]
            if heard or time.monotonic() >= deadline:
                return heard

    def _require_head(self) -> None:
        """Raise EngineError when the cluster's head is not there, and does not come back soon."""
        deadline = time.monotonic() + HEAD_TIMEOUT_S
        while why := refusal(self.head):
            if time.monotonic() > deadline:
                raise self.lost_head(f"no answer for {HEAD_TIMEOUT_S:g} s: {why}")
            time.sleep(POLL_S)

    def lost_head(self, why: object) -> EngineError:
        """Note that nothing can be asked of Ray any more; return the error to raise."""
        self._head_is_lost = True
        return EngineError(
            f"the head of the Ray cluster at {self.head} is lost ({why}): finished shards are "
            f"kept, start the cluster and run again"
        )

    def _require_place(self) -> None:
        """Raise EngineError when none of the workers has found a place for too long."""
        now = time.monotonic()
        if any(member.state != "placing" for member in self._members.values()):
            self._last_placed = now
        elif now - self._last_placed > self.start_timeout_s:
            why = f"none has been for {self.start_timeout_s:g} s"
            raise EngineError(self.size.refusal(_machines(), why))

    def _event(self, worker: int) -> Event | None:
        member = self._members[worker]
        try:
            found = ray.get(member.pending)
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, TeacherCacheError):
                return Failed(worker, cause)
            return Failed(worker, _not_loaded(error) if member.state == "placing" else error)
        except RayError as error:
            self._require_head()  # with it gone no worker can be ended or replaced
            return Lost(worker, first_line(error))
        member.pending = None
        match member.state:
            case "placing":
                self._versions.require(*found)
                member.state = "loading"
                arguments = (self.stage, self.context, self._threads)
                member.pending = member.actor.load.remote(*arguments)
                return None
            case "loading":
                member.state = "ready"
                return Ready(worker)
            case _:
                return Done(worker, found)

    def end(self, worker: int) -> None:
        member = self._members.pop(worker)
        ray.kill(member.actor)
        if member.group is not None:
            remove_placement_group(member.group)

    def close(self) -> None:
        """Let workers without a job free their engines; end all others at once."""
        if self._head_is_lost:
            return  # they end with their machine; Ray would wait for the head to end them
        resting = [m for m in self._members.values() if m.state == "ready" and m.pending is None]
        closed = [member.actor.close.remote() for member in resting]
        if closed:
            ray.wait(closed, num_returns=len(closed), timeout=20.0)
        for worker in list(self._members):
            self.end(worker)


def _absolute(context: StageContext) -> StageContext:
    """Return the context with no path that means another place in another folder."""
    models = {}
    for name, spec in context.models.items():
        adapter = None if spec.adapter is None else spec.adapter.absolute()
        models[name] = replace(spec, base=spec.base.absolute(), adapter=adapter)
    engine = context.engine
    if engine.cache_dir is not None:
        cache_dir = engine.cache_dir.expanduser().absolute()
        engine = engine.model_copy(update={"cache_dir": cache_dir})
    return replace(context, models=models, engine=engine)


def _not_loaded(error: Exception) -> ConfigError:
    """Return the error for a worker that cannot so much as import this file."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ConfigError(
        f"a worker cannot load teachercache ({lines[-1].strip()}): install the same version on "
        f"every machine of the cluster"
    )
