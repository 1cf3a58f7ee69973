"""A run told to TensorBoard, Weights & Biases or MLflow, through transformers' own callbacks.

What they are told is what a run logs: the loss and its parts, and what held-out rows say before
and after. A run that goes on from a checkpoint goes on with its log there: TensorBoard drops what
an earlier process wrote behind that checkpoint, the others find the run by its name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from stages.student.options import TENSORBOARD_FOLDER, TrainOptions

PROJECT = "teachercache"


class Trackers(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """All trackers of one run, for the one process that logs; ``finish`` closes them."""

    def __init__(self, options: TrainOptions, output: Path, before: Mapping[str, float]) -> None:
        """``before`` are the held-out means of the student as it was."""
        self._options, self._output, self._before = options, output, before
        self._told: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a log of each, or go on with it."""
        for name in self._options.report_to:
            self._told.append(self._opened(name, state.global_step))
        for tracker in self._told:
            tracker.on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            self.on_log(args, state, control, _held_out(self._before), **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell each what is logged."""
        for tracker in self._told if logs else ():
            tracker.on_log(args, state, control, logs=dict(logs or {}), **kwargs)

    def finish(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        after: Mapping[str, float],
    ) -> None:
        """Tell the held-out means of the trained student, and close every log that was opened."""
        if not self._told:
            return
        self.on_log(args, state, control, _held_out(after))
        for name, tracker in zip(self._options.report_to, self._told, strict=True):
            tracker.on_train_end(args, state, control)
            if name == "wandb":
                import wandb

                wandb.finish()
            if name == "mlflow":
                import mlflow

                mlflow.end_run()
        self._told = []

    def _opened(self, name: str, step: int) -> Any:
        if name == "tensorboard":
            return _TensorBoard(self._folder(), step)
        if name == "wandb":
            _begin_wandb(self._options.run_name)
            return WandbCallback()
        _begin_mlflow(self._options.run_name)
        return MLflowCallback()

    def _folder(self) -> Path:
        place = os.environ.get(TENSORBOARD_FOLDER)
        if place is None:
            return self._output / "tensorboard"
        return Path(place).expanduser() / self._options.run_name


class _TensorBoard(TensorBoardCallback):  # type: ignore[misc]  # transformers is untyped
    """Writes into ``folder``; what is there of steps after ``step`` counts no more."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self.logging_dir = str(folder)
        self._step = step

    def _init_summary_writer(self, args: TrainingArguments) -> None:
        self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=self._step + 1)


def _begin_wandb(run_name: str) -> None:
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    wandb.init(project=project, name=run_name, id=run_name, resume="allow")


def _begin_mlflow(run_name: str) -> None:
    import mlflow

    named = f"attributes.run_name = '{run_name}'"
    found = mlflow.search_runs(filter_string=named, output_format="list", max_results=1)
    if found:
        mlflow.start_run(run_id=found[0].info.run_id)
    else:
        mlflow.start_run(run_name=run_name)


def _held_out(means: Mapping[str, float]) -> dict[str, float]:
    """Return means under the names that transformers' callbacks show as of an evaluation."""
    return {f"eval_{name}": value for name, value in means.items()}
