"""How a process leaves the group that it was trained in: while its interpreter is whole."""

import gc

from torch import distributed


def leave_group() -> None:
    """End the group, if there is one, and its threads; all processes of it are to do so.

    With gloo (torch 2.13) a thread of the group may be the last to hold a collective's tensor, and
    takes Python's lock to free it. Where the interpreter has begun to end by then, as on a machine
    with more to do than it has cores, that aborts the process, whose work is done.
    """
    gc.collect()  # else the reducer of a model in a cycle holds the group, and its threads live on
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
