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
import time
from collections.abc import Callable, Sequence
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
from schemas.storage.files import write_text
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.causal_lm.model import student_vocab_size
from stages.models.causal_lm.sequence_logprobs import MICRO_BATCH_TOKENS
from stages.models.checkpoints.checkpoint import WHOLE
from stages.student.episode_loader import BiAlignCollator, EpisodesWithText, IclCollator
from stages.student.evaluation import DTYPES, advantage_heads_of, teacher_head_of
from stages.student.loader import Collator, SignalRows, encoding_of
from stages.student.objectives import OBJECTIVES
from stages.student.pair_loader import AdpaCollator, ChosenCollator, DckdCollator, DpoCollator
from stages.student.step import Step, Term, Unit
from stages.student.step_rows import STAND_IN, StepLoader, StepRows, WithStandIn
from stages.student.train_config import (
    AdpaConfig,
    BiAlignConfig,
    CrossEntropyConfig,
    DckdConfig,
    DpoConfig,
    IclDistillationConfig,
    SftConfig,
    TrainConfig,
    TrainOptions,
)

OnEvent = Callable[[dict[str, Any]], None]
OnCheckpoint = Callable[[Path], None]
UNITS: tuple[Unit, ...] = ("tokens", "samples")


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
    ) -> None:
        """Set up for one run; ``on_event`` and ``on_checkpoint`` are the main process's only.

        The second is called with the folder of each checkpoint when it is whole.
        """
        rows, collator = _rows_and_collator(
            config, dataset, lm_dataset, vocab_size=student_vocab_size(model)
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=collator,
            callbacks=[_Reporter(on_event)] if on_event and args.process_index == 0 else None,
        )
        self.remove_callback(PrinterCallback)
        self._config = config
        self._on_checkpoint = on_checkpoint
        self._teacher_head = teacher_head
        self._lm_teacher_head = teacher_head_of(lm_dataset, args.device) if lm_dataset else None
        self._advantage_heads = advantage_heads_of(dataset, args.device)
        self._micro_batch_tokens = micro_batch_tokens
        self._logged = _Sums()
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
        objective = self._config.objective
        terms = OBJECTIVES[objective.loss](objective, inputs, self._step(model))
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

    def get_train_dataloader(self) -> StepLoader:
        """Load this process's share of each step; accelerate's own would repeat rows to fill it."""
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
        )

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor:
        """Return the step's counts of ``UNITS``; the Trainer's own is of tokens alone."""
        counts = [(0, 0), *(counts_of(batch) for batch in batch_samples)]
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
            write_text(folder / WHOLE, "")
            if self._on_checkpoint is not None:
                self._on_checkpoint(folder)

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
            raise TeacherCacheError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: lower lr "
                f"({self._config.lr:g}) or max_grad_norm ({self._config.max_grad_norm:g})"
            )


def counts_of(batch: dict[str, Any]) -> tuple[int, int]:
    """Return a batch's scored tokens and samples (``UNITS``), for losses to be divided by.

    The answers of ``IclCollator`` and ``DpoCollator`` count as samples, so only running text has
    tokens there; both sequences of a preference pair are one sample.
    """
    if STAND_IN in batch:
        return 0, 0
    if "answers" in batch:
        text = batch.get("lm")
        return len(text["positions_N"]) if text else 0, len(batch["answers"])
    return len(batch["positions_N"]), batch.get("num_samples", len(batch["input_ids"]))


def _rows_and_collator(
    config: TrainConfig,
    dataset: CachedDataset,
    lm_dataset: CachedDataset | None,
    *,
    vocab_size: int,
) -> tuple[Any, Callable[[Sequence[Any]], dict[str, Any]]]:
    """Return what the objective reads, and what makes a batch of it."""
    match config.objective:
        case CrossEntropyConfig():
            return SignalRows(dataset), Collator("", vocab_size)
        case BiAlignConfig():
            signals = Collator(encoding_of(dataset), vocab_size)
            return SignalRows(dataset), BiAlignCollator(signals)
        case IclDistillationConfig() as icl:
            text = None
            if lm_dataset is not None:
                text = Collator(encoding_of(lm_dataset) if icl.needs_teacher else "", vocab_size)
            rows = EpisodesWithText(dataset, lm_dataset, seed=config.seed)
            return rows, IclCollator(vocab_size, text)
        case SftConfig():
            return SignalRows(dataset), ChosenCollator(Collator("", vocab_size))
        case DpoConfig():
            return SignalRows(dataset), DpoCollator(vocab_size)
        case DckdConfig():
            signals = Collator(encoding_of(dataset), vocab_size)
            return SignalRows(dataset), DckdCollator(signals)
        case AdpaConfig():
            return SignalRows(dataset), AdpaCollator.of(dataset, vocab_size)
        case _:
            return SignalRows(dataset), Collator(encoding_of(dataset), vocab_size)


class _Sums:
    """Running sums of the terms' parts, left on the device until somebody asks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.units: dict[str, Unit] = {}
        self.counts = [0] * len(UNITS)

    def add(self, terms: Sequence[Term], counts: Sequence[int]) -> None:
        for term in terms:
            for name, value in term.sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.units[name] = term.unit
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]

    def take(self, device: torch.device, reduce: Callable[..., Any]) -> dict[str, float]:
        """Return the means over all processes and the counts; start again at zero."""
        values = [value.float().reshape(()) for value in self.sums.values()]
        local_S = torch.stack([*values, *torch.tensor(self.counts, device=device).float()])
        totals = reduce(local_S, reduction="sum").tolist()
        found = {f"num_{unit}": totals[i - len(UNITS)] for i, unit in enumerate(UNITS)}
        means = {
            name: total / max(found[f"num_{self.units[name]}"], 1.0)
            for name, total in zip(self.sums, totals, strict=False)  # the counts come last
        }
        self.sums, self.counts = {}, [0] * len(UNITS)
        return means | found


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
        seconds = max(now - self.clock, 1e-9)
        self.clock = now
        speed = {f"{unit}_per_s": logs.get(f"num_{unit}", 0.0) / seconds for unit in UNITS}
        self._tell("step", state, **logs, **speed)

    def _tell(self, event: str, state: TrainerState, **values: float) -> None:
        place = {"event": event, "step": state.global_step, "max_steps": state.max_steps}
        self.on_event(place | values)


def training_arguments(
    config: TrainConfig, options: TrainOptions, folder: Path
) -> TrainingArguments:
    """Translate a run for the Trainer; starts the process group when a launcher asked for one.

    Raises ConfigError when a step's rows cannot be divided over the group.
    """
    on_gpu = options.device == "auto" and torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.max_steps or -1,
        num_train_epochs=config.epochs or 1.0,
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
    share = config.share(args.world_size)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = share
    return args
