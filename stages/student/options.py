"""Where a student is trained or measured: never hashed, it changes no more than the last bits."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Where a run happens; never hashed. ``num_workers`` decode rows, 0 decodes in the trainer.

    ``micro_batch_tokens`` bounds a forward over subsets and candidates, whose number is not that of
    the rows; activations of one such forward are held at a time.
    """

    device: Literal["auto", "cpu"] = "auto"
    num_workers: int = 1
    eval_batch_size: int = 8
    log_every: int = 5
    checkpoint_every: int = 200
    micro_batch_tokens: int = 8192
    verify: bool = True
