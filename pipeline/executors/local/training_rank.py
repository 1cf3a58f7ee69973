"""What torch's launcher starts for each process of a training step: one part of the group.

The socket named on the command line gives the job and takes events, and at the end an error if
there is one. When the other end has gone, so has the run: this process ends then too.
"""

import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from schemas.errors import TeacherCacheError


def main(address: str) -> None:
    """Get the job from ``address`` and carry out this process's part of it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the run says that it was interrupted
    _take_share_of_cores()
    line = socket.socket(socket.AF_UNIX)
    line.connect(address)
    os.register_at_fork(after_in_child=lambda: os.close(line.fileno()))  # loaders outlive us
    with line.makefile("rb") as stream:
        job = pickle.load(stream)
    threading.Thread(target=_end_with_run, args=(line,), daemon=True).start()

    def say(message: Any) -> None:
        line.sendall(pickle.dumps(message))

    try:
        job.carry_out(say, leaves_group=True)
    except TeacherCacheError as error:
        say(error)
        sys.exit(error.exit_code)
    except Exception:
        say(traceback.format_exc())
        raise


def _take_share_of_cores() -> None:
    """Set torch's threads, which is not loaded yet: all cores for each would slow all down."""
    cores = len(os.sched_getaffinity(0))
    share = max(cores // int(os.environ["LOCAL_WORLD_SIZE"]), 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))


def _end_with_run(line: socket.socket) -> None:
    """Wait for the end of the run, which says nothing after the job; take loaders along."""
    line.recv(1)
    os.killpg(0, signal.SIGKILL)  # the launcher gives each process a group of its own


if __name__ == "__main__":
    main(sys.argv[1])
