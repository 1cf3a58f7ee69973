"""Carry out a training step in several processes of this machine, through torch's own launcher.

The launcher (torchrun's) starts them, gives each its rank, and ends all when one fails; each runs
``training_rank``. What they say comes in over a Unix socket, so that a person sees one run.
"""

import logging
import pickle
import signal
import socketserver
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pipeline.executors.training_job import OnEvent, TrainingJob
from schemas.errors import ConfigError, EngineError, TeacherCacheError

# How lines begin by which C++ and Python say why they abort a process.
_OF_AN_ABORT = ("terminate called", "what():", "Fatal Python error", "FATAL")
_MOST_SAID = 300
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def train_in_processes(job: TrainingJob, num_processes: int, on_event: OnEvent) -> None:
    """Train on ``num_processes`` processes, one GPU each where there are GPUs.

    ``on_event`` is called in another thread, while this one waits. Raises the error that a process
    raised, ConfigError for fewer GPUs than processes, and EngineError when a process died. A signal
    that ends a run ends the processes first.
    """
    _refuse_missing_gpus(job, num_processes)
    try:
        with tempfile.TemporaryDirectory(prefix="teachercache-") as folder:
            _launch(job, num_processes, on_event, Path(folder))
    except SignalException as error:  # with the handlers back that were there before
        signal.raise_signal(error.sigval)
        raise EngineError(  # a run that is told to ignore the signal, its processes were not
            f"training was ended by {error.sigval.name}: the last whole checkpoint is kept, run "
            f"again to go on from it"
        ) from error


def _refuse_missing_gpus(job: TrainingJob, num_processes: int) -> None:
    found = torch.cuda.device_count()
    if job.options.device == "auto" and 0 < found < num_processes:
        raise ConfigError(
            f"training_processes is {num_processes}, this machine has {found} GPUs and a process "
            f"takes one: ask for {found} or fewer"
        )


def _launch(job: TrainingJob, num_processes: int, on_event: OnEvent, folder: Path) -> None:
    address = str(folder / "run")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
    )
    # -P keeps the folder of the run off the path, where a user may have a `schemas` of his own.
    command = ("-P", "-m", "pipeline.executors.local.training_rank", address)
    with _Desk(address, job, on_event) as desk:
        failures: Mapping[int, ProcessFailure] = {}
        with _quiet_launcher(), desk.open():
            try:
                elastic_launch(config, sys.executable)(*command)
            except ChildFailedError as error:
                failures = error.failures
    if failures:
        _raise(failures, desk.errors, folder / "logs")


class _Desk(socketserver.ThreadingUnixStreamServer):
    """Gives the job to each process that calls, and takes in what it says until it hangs up."""

    def __init__(self, address: str, job: TrainingJob, on_event: OnEvent) -> None:
        super().__init__(address, _Call)
        self.job, self.on_event = pickle.dumps(job), on_event
        self.errors: list[TeacherCacheError | str] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Answer calls; at the end, wait until all that was said has been heard."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def hear(self, message: dict[str, Any] | TeacherCacheError | str) -> None:
        """Pass an event on, keep an error (a text is a traceback)."""
        if isinstance(message, dict):
            self.on_event(message)
        else:
            self.errors.append(message)


class _Call(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Desk)
        # A process that is killed may hang up in the middle of a word.
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            self.wfile.write(self.server.job)
            while True:
                self.server.hear(pickle.load(self.rfile))


def _raise(
    failures: Mapping[int, ProcessFailure], errors: list[TeacherCacheError | str], logs: Path
) -> None:
    """Raise the cause, of all that went wrong because of it: the others lose their partner."""
    for error in errors:
        if isinstance(error, TeacherCacheError):
            raise error
    ended = list(failures.items())  # those that the launcher ended itself have its SIGTERM
    killed = [(r, f) for r, f in ended if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    if errors and not killed:
        raise RuntimeError(f"a training process failed:\n{errors[0]}")
    rank, failure = (killed or ended)[0]
    how = f"exit code {failure.exitcode}"
    if failure.exitcode < 0:
        how = signal.Signals(-failure.exitcode).name
        if failure.exitcode == -signal.SIGABRT:
            how += f": {_last_words(logs, rank)}"
    raise EngineError(
        f"training process {rank} died ({how}; SIGKILL may be for want of memory): the last whole "
        f"checkpoint is kept, run again to go on from it"
    )


def _last_words(logs: Path, rank: int) -> str:
    """Return what a process that aborted wrote about it."""
    files = sorted(logs.glob(f"*/attempt_*/{rank}/stderr.log"))
    text = files[-1].read_text(errors="replace") if files else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    why = [line for line in lines if line.startswith(_OF_AN_ABORT)] or lines[-1:]
    return " ".join(why)[:_MOST_SAID] or "it said nothing"


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Keep the launcher's warnings out of the log, and its signal handlers out of later steps."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for number, handler in before.items():
            signal.signal(number, handler)
