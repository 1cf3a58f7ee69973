"""``transformers.Trainer`` with the loss taken out of the model.

The Trainer brings checkpoints, resume, accelerate (DDP), schedulers and clipping. What is ours:

- The model gives hidden states; head, softmax and loss are one chunked pass (``chunked_loss``), so
  no [B, T, V] is ever held.
- The loss of a step is the sum over scored tokens divided by their number in the whole step: all
  accumulated batches of all processes. DDP averages gradients, hence the factor ``num_processes``.
- No logger, no console: what happens goes to the caller.

Dimensions: N = scored positions of a batch, S = sums an objective reports.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from schemas.dataset import CachedDataset
from schemas.errors import TeacherCacheError
from stages.language_head import LanguageHead
from stages.student.chunked_loss import chunked_loss
from stages.student.evaluation import DTYPES
from stages.student.loader import Collator, SignalRows, encoding_of
from stages.student.objectives import OBJECTIVES
from stages.student.student_model import (
    last_layer_of,
    scored_hidden_states,
    student_head,
    student_vocab_size,
)
from stages.student.train_config import TrainConfig, TrainOptions

OnEvent = Callable[[dict[str, Any]], None]


class DistillationTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Train on batches of ``Collator``; logs the loss and the means of the objective's parts."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        dataset: CachedDataset,
        config: TrainConfig,
        teacher_head: LanguageHead | None,
        on_event: OnEvent | None,
    ) -> None:
        """Set up for one run; ``on_event`` is called by the main process only."""
        wants_teacher = config.objective.loss != "cross_entropy"
        encoding = encoding_of(dataset) if wants_teacher else ""
        super().__init__(
            model=model,
            args=args,
            train_dataset=SignalRows(dataset),
            data_collator=Collator(encoding, student_vocab_size(model)),
            callbacks=[_Reporter(on_event)] if on_event and args.process_index == 0 else None,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the Trainer counts a step's tokens only then
        self._config = config
        self._teacher_head = teacher_head
        self._last_layer = last_layer_of(model)
        self._logged = _Sums()
        self.num_tokens = 0  # scored, by this process, since this call of train()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this batch's share of the step's mean; ``model`` may be wrapped by DDP."""
        assert not return_outputs, "evaluation has its own loop"
        hidden_ND = scored_hidden_states(model, inputs, last_layer=self._last_layer)
        make = OBJECTIVES[self._config.objective.loss]
        objective = make(self._config.objective, inputs, self._teacher_head)
        assert isinstance(self.model, PreTrainedModel)
        head, dtype = student_head(self.model), DTYPES[self._config.dtype]
        result = chunked_loss(hidden_ND, head, objective, dtype=dtype)
        self._logged.add(result.sums, len(hidden_ND))
        self.num_tokens += len(hidden_ND)
        num_tokens = len(hidden_ND) if num_items_in_batch is None else num_items_in_batch
        # A step without a scored token has a loss and gradients of exactly 0, whatever divides it.
        divisor = torch.as_tensor(num_tokens, device=hidden_ND.device).clamp(min=1)
        loss: Tensor = result.loss * self.accelerator.num_processes / divisor
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the objective's parts over all processes since the last log."""
        if "loss" in logs:
            parts = self._logged.take(self.args.device, self.accelerator.reduce)
            logs = {**logs, **{name: value for name, value in parts.items() if name != "loss"}}
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise TeacherCacheError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: lower lr "
                f"({self._config.lr:g}) or max_grad_norm ({self._config.max_grad_norm:g})"
            )


class _Sums:
    """Running sums of an objective's parts, left on the device until somebody asks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_tokens = 0

    def add(self, sums: Mapping[str, Tensor], num_tokens: int) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.num_tokens += num_tokens

    def take(self, device: torch.device, reduce: Callable[..., Any]) -> dict[str, float]:
        """Return the means over all processes and the count of tokens; start again at zero."""
        names = list(self.sums)
        values = [self.sums[name].float().reshape(()) for name in names]
        local_S = torch.stack([*values, torch.tensor(float(self.num_tokens), device=device)])
        *totals, num_tokens = reduce(local_S, reduction="sum").tolist()
        self.sums, self.num_tokens = {}, 0
        means = [total / max(num_tokens, 1.0) for total in totals]
        return dict(zip(names, means, strict=True)) | {"num_tokens": num_tokens}


class _Reporter(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Turns the Trainer's logs into events: ``start`` once, then ``step`` with its numbers."""

    def __init__(self, on_event: OnEvent) -> None:
        self.on_event = on_event
        self.clock = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.clock = time.monotonic()
        self._tell("start", state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        now = time.monotonic()
        speed = logs.get("num_tokens", 0.0) / max(now - self.clock, 1e-9)
        self.clock = now
        self._tell("step", state, **logs, tokens_per_s=speed)

    def _tell(self, event: str, state: TrainerState, **values: float) -> None:
        place = {"event": event, "step": state.global_step, "max_steps": state.max_steps}
        self.on_event(place | values)


def training_arguments(
    config: TrainConfig, options: TrainOptions, folder: Path
) -> TrainingArguments:
    """Translate a run for the Trainer; starts the process group when a launcher asked for one."""
    on_gpu = options.device == "auto" and torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.max_steps or -1,
        num_train_epochs=config.epochs or 1.0,
        per_device_train_batch_size=config.per_device_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.lr,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.dtype == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=not on_gpu,
        logging_steps=options.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a loss that is not a number
        save_steps=options.checkpoint_every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=options.num_workers,
        dataloader_persistent_workers=options.num_workers > 0,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs go through a launcher and DDP, never through DataParallel
    return args
