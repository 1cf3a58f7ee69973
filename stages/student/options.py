"""Where a student is trained or measured: never hashed, it changes no more than the last bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stages.student.packages import Package

Tracker = Literal["tensorboard", "wandb", "mlflow"]
Sharding = Literal["none", "full"]
TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"  # the variable that transformers reads, too


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Where a run happens; never hashed. ``num_workers`` decode rows, 0 decodes in the trainer.

    ``micro_batch_tokens`` bounds a forward over subsets and candidates, whose number is not that of
    the rows; activations of one such forward are held at a time. ``report_to`` are trackers that
    are told what is logged, of a run called ``run_name``. With ``sharding`` the weights are divided
    over the processes of a run.
    """

    device: Literal["auto", "cpu"] = "auto"
    num_workers: int = 1
    eval_batch_size: int = 8
    log_every: int = 5
    checkpoint_every: int = 200
    micro_batch_tokens: int = 8192
    verify: bool = True
    report_to: tuple[Tracker, ...] = ()
    run_name: str = ""
    sharding: Sharding = "none"

    def packages(self) -> Iterator[Package]:
        """Yield what the trackers need."""
        for name in self.report_to:
            modules = ("tensorboardX", "tensorboard") if name == "tensorboard" else (name,)
            yield Package(f"report_to: {name}", modules, modules[0])
