"""One training step, ready to be carried out by any process: it is picklable and needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.student.train_config import TrainConfig, TrainOptions

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """What to train, from where, to where; see ``stages.student.trainer.train``."""

    config: TrainConfig
    student: Path
    data: tuple[Path, ...]
    output: Path
    fingerprint: str
    lm_data: tuple[Path, ...] = ()
    options: TrainOptions = field(default_factory=TrainOptions)

    def carry_out(self, on_event: OnEvent) -> None:
        """Train, alone or as one process of a group that the environment describes."""
        from stages.student.trainer import train  # loads torch and transformers

        train(
            self.config,
            student=self.student,
            data=self.data,
            lm_data=self.lm_data,
            output=self.output,
            fingerprint=self.fingerprint,
            options=self.options,
            on_event=on_event,
        )
