"""One way to train on a student's own tokens, in a process of its own: each step's time, the peak.

``benchmarks/training/opd.py`` starts this file once a variant and round, with a job as JSON, and
reads its answer from a file. ``live`` is the product's objective and batches, but the teacher's
log-probs are computed at every step, by the cheapest pass there is: one forward over the batch, and
the head a chunk of positions at a time.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.training.training_variants import CPU, StepClock
from schemas.dataset import open_dataset
from stages.models.causal_lm.chunked_loss import StudentHead, chunked_loss
from stages.models.causal_lm.model import (
    last_layer_of,
    load_student,
    scored_hidden_states,
    student_head,
)
from stages.student.batches.training_data import teacher_head_of
from stages.student.objectives.kd import KdConfig
from stages.student.objectives.opd import OpdConfig
from stages.student.options import TrainOptions
from stages.student.train.arguments import training_arguments
from stages.student.train.distillation_trainer import DistillationTrainer
from stages.student.train.stage import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process is told; folders are texts so that it survives JSON."""

    variant: str
    student: str
    teacher: str
    data: list[str]
    batch_size: int
    steps: int

    @property
    def config(self) -> TrainConfig:
        """The run; no step is refused, as the steps are what is measured."""
        return TrainConfig(
            objective=KdConfig() if self.variant == "kd" else OpdConfig(max_staleness=1e9),
            lr=1e-5,
            max_steps=self.steps,
            per_device_batch_size=self.batch_size,
        )


@dataclass(frozen=True, slots=True)
class NextLogprobs:
    """Keep log p of the next token of each position, and nothing else."""

    SUMS: ClassVar[tuple[str, ...]] = ("loss",)

    next_token_ids_N: Tensor
    kept_N: Tensor

    @property
    def extra_blocks(self) -> int:
        """None."""
        return 0

    def reduce_(self, logprobs_CV: Tensor, rows: slice, *, with_grad: bool) -> Tensor:
        """Fill ``kept_N``; see ``chunked_loss.PositionLoss``."""
        self.kept_N[rows] = logprobs_CV.gather(1, self.next_token_ids_N[rows, None])[:, 0]
        return logprobs_CV.new_zeros(1)


class LiveTrainer(DistillationTrainer):
    """The product's trainer, with the teacher run at every step."""

    teacher: Any
    head: StudentHead

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Put live log-probs in the place of the cached ones."""
        with torch.no_grad():
            last = last_layer_of(self.teacher)
            hidden_ND = scored_hidden_states(self.teacher, inputs, last_layer=last)
            live_N = hidden_ND.new_zeros(len(hidden_ND))
            kept = NextLogprobs(inputs["next_token_ids_N"], live_N)
            chunked_loss(hidden_ND, self.head, kept, dtype=torch.float32)
        live = {"teacher_logprobs_N": live_N}
        return super().compute_loss(model, inputs | live, return_outputs, num_items_in_batch)


def run_job(job: Job) -> Mapping[str, Any]:
    """Train; return step times, the peak and the first loss."""
    dataset = open_dataset(job.data, split="train", verify=False)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(device="cpu", num_workers=0, log_every=1)
        args = training_arguments(job.config, options, Path(folder))
        args.set_save(strategy="no")
        kind = LiveTrainer if job.variant == "live" else DistillationTrainer
        trainer = kind(
            load_student(Path(job.student), device=CPU),
            args,
            dataset=dataset,
            config=job.config,
            teacher_head=teacher_head_of(dataset, CPU),
            on_event=None,
        )
        if isinstance(trainer, LiveTrainer):
            trainer.teacher = load_student(Path(job.teacher), device=CPU).eval()
            trainer.head = student_head(trainer.teacher)
        trainer.add_callback(clock)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "step_s": [b - a for a, b in zip(clock.wall, clock.wall[1:], strict=False)],
        "step_cpu_s": [b - a for a, b in zip(clock.cpu, clock.cpu[1:], strict=False)],
        "tokens": [entry["num_tokens"] for entry in history],
        "peak_mb": clock.peak_mb,
        "first_loss": history[0]["loss"],
    }


if __name__ == "__main__":
    answer = run_job(Job(**json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(answer))
