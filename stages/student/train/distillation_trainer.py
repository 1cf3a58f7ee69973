"""``transformers.Trainer`` with the loss taken out of the model.

The Trainer brings checkpoints, resume, accelerate (DDP), schedulers and clipping. What is ours:

- The model gives hidden states; head, softmax and loss are one chunked pass (``chunked_loss``), so
  no [B, T, V] is ever held.
- A loss is a list of terms (``step``), each a sum divided by the whole step's count of scored
  tokens or of samples: all accumulated batches of all processes. DDP averages gradients, hence the
  factor ``num_processes``.
- Batches are those of ``step_rows``: the rows of a step do not depend on the processes.
- A checkpoint is marked whole when every process has written its part.
- No logger, no console: what happens goes to the caller.

Dimensions: N = scored positions of a batch, S = sums an objective reports.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from schemas.dataset import CachedDataset
from schemas.errors import ConfigError
from schemas.storage.files import write_text
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.causal_lm.model import student_vocab_size
from stages.models.causal_lm.sequence_logprobs import MICRO_BATCH_TOKENS
from stages.models.checkpoints.checkpoint import WHOLE
from stages.models.encoder_decoder.halves import frame_of
from stages.student.batches.step_rows import STAND_IN, StepLoader, StepRows, WithStandIn, counts_of
from stages.student.batches.training_data import TrainingData, advantage_heads_of, teacher_head_of
from stages.student.evaluate.positions import DTYPES
from stages.student.lora import load_lora
from stages.student.losses.step import UNITS, Step
from stages.student.train.early_stopping import EarlyStop
from stages.student.train.loss_log import EventReporter, RunningSums
from stages.student.train.sharding import set_sharding
from stages.student.train.stage import TrainConfig
from stages.student.train.trackers import Trackers

OnEvent = Callable[[dict[str, Any]], None]
OnCheckpoint = Callable[[Path], None]


class DistillationTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Train on batches of the objective's; logs the loss and the means of its parts."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the counts of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        dataset: CachedDataset,
        config: TrainConfig,
        teacher_head: LanguageHead | None,
        on_event: OnEvent | None,
        lm_dataset: CachedDataset | None = None,
        micro_batch_tokens: int = MICRO_BATCH_TOKENS,
        on_checkpoint: OnCheckpoint | None = None,
        num_token_ids: int | None = None,
        reader: PreTrainedModel | None = None,
        trackers: Trackers | None = None,
        early_stop: EarlyStop | None = None,
        on_divided: Callable[[], None] | None = None,
        teacher_heads: Mapping[int, LanguageHead] | None = None,
    ) -> None:
        """Set up for one run; events, checkpoints and trackers are the main process's only.

        ``on_checkpoint`` is called with the folder of each checkpoint when it is whole. Ids from
        ``num_token_ids`` on are no token's (None: not known). With a ``reader`` ``model`` is a
        distiller; the Trainer has no part in the reader. ``on_divided`` is called by every process
        when the untrained student has been divided over them, where it is. ``teacher_heads`` are
        those of several teachers' tables, by their place in the data.
        """
        vocab_size = student_vocab_size(reader or model)
        data = TrainingData(
            dataset,
            lm_dataset,
            vocab_size,
            config.seed,
            num_token_ids,
            packing=config.packing,
            reader_frame=None if reader is None else frame_of(reader.config),
        )
        told: list[Any] = [
            *([EventReporter(on_event)] if on_event else ()),
            *([trackers] if trackers else ()),
        ]
        stops = [] if early_stop is None else [early_stop]
        rows, collator = config.objective.batches(data)
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=collator,
            callbacks=[*(told if args.process_index == 0 else ()), *stops],
        )
        set_sharding(self, DTYPES[config.dtype])
        self.remove_callback(PrinterCallback)
        self._config = config
        self._on_checkpoint, self._on_divided = on_checkpoint, on_divided
        self._teacher_head, self._teacher_heads = teacher_head, teacher_heads or {}
        self._lm_teacher_head = (
            teacher_head_of(lm_dataset, args.device, num_token_ids) if lm_dataset else None
        )
        self._advantage_heads = advantage_heads_of(dataset, args.device, num_token_ids)
        self._reader = reader
        self._micro_batch_tokens = micro_batch_tokens
        self._logged = RunningSums()
        self._early_stop = early_stop
        if early_stop is not None:
            early_stop.log = self.log
        # Of this process, since this call of train(): scored tokens, and rows.
        self.num_tokens, self.num_samples = 0, 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this batch's share of the step's mean; ``model`` may be wrapped by DDP."""
        assert not return_outputs, "evaluation has its own loop"
        terms = self._config.objective.terms(inputs, self._step(model))
        if STAND_IN in inputs:
            terms = [term.without_effect() for term in terms]
        counts = counts_of(inputs)
        self._logged.add(terms, counts)
        self.num_tokens += counts[0]
        self.num_samples += counts[1]
        step_counts = counts if num_items_in_batch is None else num_items_in_batch
        # A step without a scored token has a loss and gradients of exactly 0, whatever divides it.
        divisors = torch.as_tensor(step_counts, device=self.args.device).clamp(min=1)
        divisor_of = dict(zip(UNITS, divisors, strict=True))
        processes = self.accelerator.num_processes
        shares = [t.weight * (t.total * processes / divisor_of[t.unit]) for t in terms]
        return torch.stack(shares).sum()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Call ``on_divided`` first: a student is divided by now, and no checkpoint loaded yet."""
        if self.is_fsdp_enabled and self._on_divided is not None:
            self._on_divided()
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> StepLoader:
        """Load this process's share of each step; accelerate's own would repeat rows to fill it."""
        self._logged.begin()
        args = self.args
        rows = StepRows(
            len(self.train_dataset),
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            seed=self._config.seed,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return StepLoader(
            self.train_dataset,
            batch_sampler=rows,
            collate_fn=WithStandIn(self.data_collator, self.train_dataset[0]),
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def _step(self, model: nn.Module) -> Step:
        assert isinstance(self.model, PreTrainedModel)
        return Step(
            model=model,
            bare=self.model,
            dtype=DTYPES[self._config.dtype],
            teacher_head=self._teacher_head,
            lm_teacher_head=self._lm_teacher_head,
            micro_batch_tokens=self._micro_batch_tokens,
            progress=self.state.global_step / max(self.state.max_steps - 1, 1),
            advantage_heads=self._advantage_heads,
            reader=self._reader,
            teacher_heads=self._teacher_heads,
        )

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor:
        """Return the step's counts of ``UNITS``; the Trainer's own is of tokens alone."""
        counts = [(0,) * len(UNITS), *(counts_of(batch) for batch in batch_samples)]
        summed = torch.tensor(counts, device=device).sum(dim=0)
        gathered: Tensor = self.accelerator.reduce(summed, reduction="sum")
        return gathered

    def totals(self) -> tuple[int, int]:
        """Return the scored tokens and rows of all processes since this call of train()."""
        mine = torch.tensor([self.num_tokens, self.num_samples], device=self.args.device)
        num_tokens, num_samples = self.accelerator.reduce(mine, reduction="sum").tolist()
        return num_tokens, num_samples

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Add the file that makes it whole, when every process has written what it has to."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if self._early_stop is not None:
                self._early_stop.keep_in(folder)
            write_text(folder / WHOLE, "")
            if self._on_checkpoint is not None:
                self._on_checkpoint(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint, of an adapted student its adapter."""
        if self._config.lora is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_lora(self.model, Path(resume_from_checkpoint))

    def load_weights(self, folder: Path) -> None:
        """Put saved weights, or an adapted student's adapter, in the place of the model's own."""
        self._load_from_checkpoint(str(folder), self.model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the objective's parts over all processes since the last log.

        The epoch counts steps; the Trainer's counts the batches of one process.
        """
        steps_per_epoch = math.ceil(len(self.train_dataset) / self._config.rows_per_step)
        self.state.epoch = self.state.global_step / steps_per_epoch
        if "loss" in logs:
            parts = self._logged.take(self.args.device, self.accelerator.reduce)
            logs = {**logs, **parts}
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ConfigError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: lower lr "
                f"({self._config.lr:g}) or max_grad_norm ({self._config.max_grad_norm:g})"
            )
        if "loss" in logs:
            self._config.objective.check_logged(logs, self.state.global_step)
