"""Early stopping: held-out rows are measured every few steps, and the best weights are kept.

All that decides is in the Trainer's own log, which its checkpoints hold: a run that goes on from
one stops where it would have. A checkpoint has the best weights so far beside its own.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from schemas.errors import ConfigError
from stages.student.train.stage import EarlyStopping

BEST = "best"
MEASURED = "eval_"  # before the names of held-out means in a log, as transformers has it
_MEANS = ("reverse_kl", "kl_to_teacher", "cross_entropy")  # the first that there is decides


@dataclass(frozen=True, slots=True)
class Course:
    """What a log says so far: ``waited`` measurements ago the best was found, at ``step``."""

    name: str = ""
    step: int = 0
    best: float = float("inf")
    waited: int = 0

    @property
    def found(self) -> bool:
        """Whether anything was measured yet."""
        return bool(self.name)

    def after(self, step: int, means: Mapping[str, float], min_delta: float) -> "Course":
        """Return the course with one more measurement."""
        name = next(name for name in _MEANS if name in means)
        value = means[name]
        if not self.found or value < self.best - min_delta:
            return Course(name, step, value)
        return Course(name, self.step, self.best, self.waited + 1)


def is_of_numbers(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of a Trainer's log is of a step's losses or of held-out rows."""
    return "loss" in entry or any(name.startswith(MEASURED) for name in entry)


def course_of(log: Iterable[Mapping[str, Any]], min_delta: float) -> Course:
    """Return what a Trainer's log says of its measurements."""
    course = Course()
    for entry in log:
        means = {
            name.removeprefix(MEASURED): value
            for name, value in entry.items()
            if name.startswith(MEASURED)
        }
        if means:
            course = course.after(int(entry["step"]), means, min_delta)
    return course


class EarlyStop(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Measures, keeps the best weights in ``folder``, and stops; every process has one."""

    def __init__(
        self,
        settings: EarlyStopping,
        folder: Path,
        measure: Callable[[Any], dict[str, float]],
    ) -> None:
        """``measure`` gives the held-out means of a model, over all processes."""
        self._settings, self._measure = settings, measure
        self.best_folder = folder / BEST
        self.log: Callable[[dict[str, float]], None] = lambda logs: None  # the Trainer's own

    def is_over(self, state: TrainerState) -> bool:
        """Whether a run with this state has stopped already."""
        return self.course(state).waited >= self._settings.patience

    def course(self, state: TrainerState) -> Course:
        """Return how far a run with this state has come."""
        return course_of(state.log_history, self._settings.min_delta)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse a run that ends before anything is measured: its steps are known only now."""
        if self._settings.every > state.max_steps:
            raise ConfigError(
                f"early_stopping.every is {self._settings.every}, and the run has "
                f"{state.max_steps} steps: nothing would be measured, lower it"
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure where it is time to, and stop where nothing got better for long enough."""
        if state.global_step % self._settings.every:
            return
        means = self._measure(model)
        broken = [name for name in _MEANS if not math.isfinite(means.get(name, 0.0))]
        if broken:
            raise ConfigError(
                f"after step {state.global_step} the held-out {broken[0]} is no finite number: "
                f"lower lr ({args.learning_rate:g}) or max_grad_norm ({args.max_grad_norm:g})"
            )
        logs_loss = control.should_log
        self.log({f"{MEASURED}{name}": value for name, value in means.items()})
        control.should_log = logs_loss  # the Trainer takes any log for that of the loss
        course = self.course(state)
        if course.step == state.global_step and state.is_world_process_zero:
            shutil.rmtree(self.best_folder, ignore_errors=True)
            model.save_pretrained(self.best_folder)
        if course.waited >= self._settings.patience:
            control.should_training_stop = True

    def keep_in(self, checkpoint: Path) -> None:
        """Put the best weights so far into a checkpoint that is being written."""
        if self.best_folder.is_dir():
            shutil.copytree(self.best_folder, checkpoint / BEST, dirs_exist_ok=True)

    def take_from(self, checkpoint: Path | None) -> None:
        """Begin with the best weights that a checkpoint has, or with none."""
        shutil.rmtree(self.best_folder, ignore_errors=True)
        if checkpoint is not None and (checkpoint / BEST).is_dir():
            shutil.copytree(checkpoint / BEST, self.best_folder)


def require_heldout(num_rows: int) -> None:
    """Raise ConfigError where there is nothing to measure."""
    if not num_rows:
        raise ConfigError(
            "early_stopping measures held-out rows, and the data has none: set heldout_fraction "
            "of its source above 0, or leave early_stopping out"
        )
