"""One way to train the student, in a process of its own: speed of each step and peak memory.

``benchmarks/training/training.py`` starts this file once a variant and round, with a job as JSON,
and reads its answer from a file. All variants get the same ``TrainingArguments`` (optimizer,
schedule, seed, dtype) by construction, the same rows in the same order, and decode them in this
process (``num_workers=0``), so that nothing of the work hides in another.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from schemas.dataset import CachedDataset, open_dataset
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.causal_lm.model import (
    last_layer_of,
    load_student,
    scored_hidden_states,
    student_head,
    student_vocab_size,
)
from stages.student.batches.signals import Collator, SignalRows
from stages.student.batches.training_data import teacher_head_of
from stages.student.objectives import ObjectiveConfig
from stages.student.objectives.alm import AlmConfig
from stages.student.objectives.cross_entropy import CrossEntropyConfig
from stages.student.objectives.kd import KdConfig
from stages.student.options import TrainOptions
from stages.student.selected_positions import ByTeacherEntropy
from stages.student.train.arguments import training_arguments
from stages.student.train.distillation_trainer import DistillationTrainer
from stages.student.train.stage import TrainConfig

CPU = torch.device("cpu")
SPANS = "spans"
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "cross_entropy": CrossEntropyConfig(),
    "stock_cross_entropy": CrossEntropyConfig(),
    "cached_selected": KdConfig(positions=ByTeacherEntropy(by="teacher_entropy", fraction=0.2)),
    "cached_alm": AlmConfig(),
    "cached_alm_entries": AlmConfig(entries_weight=1.0),
}
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process is told; folders are texts so that it survives JSON."""

    variant: str
    student: str
    teacher: str
    documents: str
    signals: dict[str, str]
    spans: str
    batch_size: int
    steps: int

    @property
    def config(self) -> TrainConfig:
        """The run: pure KL where there is a teacher, or what is matched span by span."""
        return TrainConfig(
            objective=OBJECTIVES.get(self.variant, KdConfig(weight=1.0)),
            lr=6e-4,
            max_steps=self.steps,
            per_device_batch_size=self.batch_size,
        )

    def arguments(self, folder: Path) -> TrainingArguments:
        """The product's own arguments, without checkpoints."""
        options = TrainOptions(device="cpu", num_workers=0, log_every=1)
        args = training_arguments(self.config, options, folder)
        args.set_save(strategy="no")
        return args

    def dataset(self, encoding: str | None) -> CachedDataset:
        """The rows, with one encoding's signals or none; or those of spans."""
        if encoding == SPANS:
            return open_dataset([self.spans], split="train", verify=False)
        folders = [self.documents, *([self.signals[encoding]] if encoding else [])]
        return open_dataset(folders, split="train", verify=False)


@dataclass
class StepClock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Seconds and CPU seconds of each step, loading included, and the peak at the last one."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mark()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mark()
        self.peak_mb = _peak_mb()

    def _mark(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


def _peak_mb() -> float:
    """Return this program's own peak resident memory.

    ``ru_maxrss`` would not do: on Linux it starts at the size of the process that forked us.
    """
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def _ours(job: Job, args: TrainingArguments, encoding: str | None) -> Trainer:
    dataset = job.dataset(encoding)
    return DistillationTrainer(
        load_student(Path(job.student), device=CPU),
        args,
        dataset=dataset,
        config=job.config,
        teacher_head=teacher_head_of(dataset, CPU),
        on_event=None,
    )


class LiveTrainer(DistillationTrainer):
    """The product's trainer and exact objective, but the teacher runs at every step.

    The cheapest live teacher there is: hidden states only, head and loss a chunk at a time. The
    teacher's entropy, a constant of the loss, is left out.
    """

    teacher: Any

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Add what the exact table would have held."""
        with torch.no_grad():
            last = last_layer_of(self.teacher)
            hidden_ND = scored_hidden_states(self.teacher, inputs, last_layer=last)
        live = {"hidden_ND": hidden_ND, "entropies_N": hidden_ND.new_zeros(len(hidden_ND))}
        return super().compute_loss(model, inputs | live, return_outputs, num_items_in_batch)


def _live(job: Job, args: TrainingArguments) -> Trainer:
    teacher = load_student(Path(job.teacher), device=CPU).eval()
    head = student_head(teacher)
    weight_VD = head.weight_VD.detach()
    trainer = LiveTrainer(
        load_student(Path(job.student), device=CPU),
        args,
        dataset=job.dataset(None),
        config=job.config,
        teacher_head=LanguageHead(weight_VD, None, head.scale, head.softcap, torch.float32),
        on_event=None,
    )
    trainer.teacher = teacher
    return trainer


def _plain(job: Job) -> Any:
    return AutoModelForCausalLM.from_pretrained(job.student, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class PlainCollator:
    """The columns that any trainer takes; rows are packed, so there is no padding to mask."""

    ours: Collator
    with_mask: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.ours(rows)
        plain = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
        if self.with_mask:
            plain["attention_mask"] = torch.ones_like(plain["input_ids"])
        return plain


def _stock(job: Job, args: TrainingArguments) -> Trainer:
    """``transformers.Trainer`` as it comes: [B, T, V] logits and the model's own loss."""
    model = _plain(job)
    collator = PlainCollator(Collator("", student_vocab_size(model)), with_mask=False)
    rows = SignalRows(job.dataset(None))
    return Trainer(model=model, args=args, train_dataset=rows, data_collator=collator)


def _trl(job: Job, args: TrainingArguments) -> Trainer:
    """TRL's GKD off-policy (``lmbda=0``), forward KL (``beta=0``), temperature 1 (its own: 0.9)."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    model = _plain(job)
    source = job.dataset(None)
    names = ("sample_id", "input_ids_T")
    rows = [{name: source[index][name] for name in names} for index in range(len(source))]
    settings = args.to_dict() | {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "max_length": None}
    return GKDTrainer(
        model=model,
        teacher_model=AutoModelForCausalLM.from_pretrained(job.teacher, dtype=torch.float32),
        args=GKDConfig(**settings),
        train_dataset=Dataset.from_list(rows).with_format("numpy"),
        data_collator=PlainCollator(Collator("", student_vocab_size(model)), with_mask=True),
        processing_class=AutoTokenizer.from_pretrained(job.student),
    )


VARIANTS: dict[str, Callable[[Job, TrainingArguments], Trainer]] = {
    "cross_entropy": lambda job, args: _ours(job, args, None),
    "cached_threshold": lambda job, args: _ours(job, args, "threshold"),
    "cached_selected": lambda job, args: _ours(job, args, "threshold"),
    "cached_alm": lambda job, args: _ours(job, args, SPANS),
    "cached_alm_entries": lambda job, args: _ours(job, args, SPANS),
    "cached_exact": lambda job, args: _ours(job, args, "exact"),
    "live_ours": _live,
    "live_trl_gkd": _trl,
    "stock_cross_entropy": _stock,
}


def run_job(job: Job) -> dict[str, Any]:
    """Train; return step times and the peak."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = VARIANTS[job.variant](job, job.arguments(Path(folder)))
        trainer.add_callback(clock)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "step_s": [b - a for a, b in zip(clock.wall, clock.wall[1:], strict=False)],
        "step_cpu_s": [b - a for a, b in zip(clock.cpu, clock.cpu[1:], strict=False)],
        "peak_mb": clock.peak_mb,
        "first_loss": losses[0],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


if __name__ == "__main__":
    answer = run_job(Job(**json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(answer))
