"""Steps of MEND with the teacher's pass from the cache and live, in a process of its own.

``benchmarks/mend/mend.py`` starts this file once a variant, with a job as JSON, and reads its
answer from a file. ``live`` is the cheapest live teacher there is: the reader itself, which is in
memory anyhow, reads the whole demonstrations without gradients, hidden states of the scored
positions alone, and the loss is then that of ``cached_exact``. ``alternated`` takes each batch
twice, live in one step and cached in the next, so that what else runs on the machine meets both.
``shares`` takes a step apart.

Dimensions: B = rows, T = tokens as the teacher reads them, N = scored positions.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training.training_variants import StepClock
from schemas.dataset import open_dataset
from stages.models.causal_lm.model import last_layer_of, scored_hidden_states
from stages.student.batches.demonstrations import DemonstrationsCollator
from stages.student.batches.signals import Row
from stages.student.batches.step_rows import StepLoader
from stages.student.batches.training_data import teacher_head_of
from stages.student.distiller.distiller import load_distiller
from stages.student.distiller.reader import load_reader, read_hidden_states
from stages.student.losses.step import Step
from stages.student.objectives.mend import MendConfig
from stages.student.options import TrainOptions
from stages.student.train.arguments import training_arguments
from stages.student.train.distillation_trainer import DistillationTrainer
from stages.student.train.stage import TrainConfig

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsJob:
    """What a process is told; folders are texts so that it survives JSON."""

    variant: str  # cached_exact, cached_threshold, live, alternated or shares
    reader: str
    distiller: str
    asked: str
    signals: str
    batch_size: int
    steps: int

    def as_json(self) -> str:
        """Return what the process is started with."""
        return json.dumps(asdict(self))

    def is_live(self, step: int) -> bool:
        """Whether the teacher is run in this step, from 0."""
        return self.variant == "live" or (self.variant == "alternated" and step % 2 == 0)


@dataclass(frozen=True, slots=True)
class WholeRows:
    """The product's batches, and beside them the sequences that a live teacher reads."""

    ours: DemonstrationsCollator

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch with ``whole_ids_BT`` and ``whole_positions_N``."""
        whole = self.ours.signals(rows)
        added = {"whole_ids_BT": whole["input_ids"], "whole_positions_N": whole["positions_N"]}
        return self.ours(rows) | added


class Twice:
    """A loader that gives each batch two times."""

    def __init__(self, loader: StepLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return 2 * len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            yield batch
            yield dict(batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.loader.set_epoch(epoch)


class MendTrainer(DistillationTrainer):
    """The product's trainer; in live steps the cached hidden states are computed anew."""

    job: StepsJob
    reader: Any

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Put the teacher's own pass in the place of the cache's columns."""
        if self.job.is_live(self.state.global_step):
            inputs = inputs | {"hidden_ND": live_states(self.reader, inputs)}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_train_dataloader(self) -> Any:
        """Give each batch twice where steps alternate."""
        loader = super().get_train_dataloader()
        return Twice(loader) if self.job.variant == "alternated" else loader


@torch.no_grad()
def live_states(reader: Any, batch: dict[str, Any]) -> Tensor:
    """Return [N, D] of the teacher at the scored positions, after the demonstrations' text."""
    whole = {"input_ids": batch["whole_ids_BT"], "positions_N": batch["whole_positions_N"]}
    return scored_hidden_states(reader, whole, last_layer=last_layer_of(reader))


def trainer_of(job: StepsJob, folder: Path) -> MendTrainer:
    """Set the product's trainer up, without checkpoints."""
    config = TrainConfig(
        objective=MendConfig(),
        lr=1e-4,
        max_steps=job.steps,
        per_device_batch_size=job.batch_size,
    )
    args = training_arguments(
        config, TrainOptions(device="cpu", num_workers=0, log_every=1), folder
    )
    args.set_save(strategy="no")
    dataset = open_dataset([job.asked, job.signals], split="train", verify=False)
    reader = load_reader(Path(job.reader), device=CPU, dtype=torch.float32)
    trainer = MendTrainer(
        load_distiller(Path(job.distiller), device=CPU),
        args,
        dataset=dataset,
        config=config,
        teacher_head=teacher_head_of(dataset, CPU),
        on_event=None,
        reader=reader,
    )
    trainer.job, trainer.reader = job, reader
    trainer.data_collator = WholeRows(trainer.data_collator)
    return trainer


def run_steps(job: StepsJob) -> dict[str, Any]:
    """Train; return step times, losses and the peak."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(job, Path(folder))
        trainer.add_callback(clock)
        trainer.train()
    return {
        "step_s": [b - a for a, b in zip(clock.wall, clock.wall[1:], strict=False)],
        "step_cpu_s": [b - a for a, b in zip(clock.cpu, clock.cpu[1:], strict=False)],
        "peak_mb": clock.peak_mb,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


@dataclass
class Parts:
    """CPU seconds of each part of a step, once a repetition."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        started = time.process_time()
        yield
        self.seconds.setdefault(name, []).append(time.process_time() - started)


@dataclass(frozen=True, slots=True)
class StatesStep(Step):
    """A step whose reader has been run."""

    states_ND: Tensor | None = None

    def read_states(self, batch: dict[str, Any]) -> Tensor:
        """Return them."""
        assert self.states_ND is not None
        return self.states_ND


def run_shares(job: StepsJob) -> dict[str, Any]:
    """Take one batch's step apart, ``steps`` times; return the CPU seconds of each part."""
    parts = Parts()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(job, Path(folder))
        model: Any = trainer.model
        reader = trainer.reader
        optimizer = trainer.create_optimizer()
        batch = next(iter(trainer.get_train_dataloader()))
        for _ in range(job.steps):
            with parts.of("teacher's pass (live alone)"):
                live_states(reader, batch)
            with parts.of("distiller, forward"):
                shown = batch["demonstration_ids_BL"], batch["demonstration_lengths_B"]
                vectors_BMR = model(*shown)
            fed_BMR = vectors_BMR.detach().requires_grad_()
            with parts.of("reader, forward"):
                hidden_BQR = read_hidden_states(reader, fed_BMR, batch["input_ids"])
            hidden_ND = hidden_BQR.flatten(0, 1).index_select(0, batch["positions_N"])
            states_ND = hidden_ND.detach().requires_grad_()
            with parts.of("head and loss"):
                step = StatesStep(
                    model, model, torch.float32, trainer._teacher_head, None, 0, 0.0,
                    reader=reader, states_ND=states_ND,
                )  # fmt: skip
                terms = MendConfig().terms(batch, step)
                torch.autograd.backward([term.total for term in terms])
            with parts.of("reader, backward"):
                torch.autograd.backward(hidden_ND, states_ND.grad)
            with parts.of("distiller, backward"):
                torch.autograd.backward(vectors_BMR, fed_BMR.grad)
            with parts.of("clipping and AdamW"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return {"parts_cpu_s": parts.seconds}


if __name__ == "__main__":
    job = StepsJob(**json.loads(sys.argv[1]))
    answer = run_shares(job) if job.variant == "shares" else run_steps(job)
    Path(sys.argv[2]).write_text(json.dumps(answer))
