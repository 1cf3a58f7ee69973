"""Rows, batches and the loss ``kd`` for people's own ``transformers.Trainer`` and TRL trainers.

``Trainer(model, args, **distillation([inputs, signals], tokenizer, weight=0.9))`` is all there is
to write. Such a trainer runs the whole model and hands its logits and the labels to the loss, and
nothing else of a batch. So a row's number stands in ``labels[b, 0]``, which no causal loss reads as
nothing predicts a first token, and the teacher is read there and then. A batch is made of nothing
but ``input_ids``, ``attention_mask`` and ``labels``: any model, wrapped by PEFT or DDP, takes it.

Held to transformers 5.19 and TRL 1.16. The number of scored tokens of a step (all its batches, all
processes) is the trainer's own; it multiplies by the processes, which DDP divides by.

Dimensions: B = rows, T = tokens of the longest row, N = scored positions, V = the model's logits.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError, IdentityMismatch, first_line
from stages.models.causal_lm.chunked_loss import PositionLoss, logits_loss
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.causal_lm.model import require_vocabulary, rows_needed
from stages.models.checkpoints.tokenizer_identity import num_token_ids
from stages.student.batches.signals import Collator, Row, encoding_of
from stages.student.batches.training_data import teacher_head_of
from stages.student.losses.step import Term
from stages.student.objectives.kd import KdConfig

HELD_OUT = "heldout"


class Tokenizer(Protocol):
    """One of transformers'."""

    name_or_path: str

    def save_pretrained(self, folder: Path) -> Any:
        """Write its files."""


class TrainerArguments(TypedDict):
    """What a Trainer is given by these names; ``eval_dataset`` is None without held-out rows."""

    train_dataset: Any
    eval_dataset: Any
    data_collator: "NumberedCollator"
    compute_loss_func: "DistillationLoss"


def distillation(
    tables: Sequence[Path | str],
    tokenizer: Tokenizer | Path | str,
    *,
    verify: bool = True,
    **settings: Any,
) -> TrainerArguments:
    """Return what a ``transformers.Trainer`` or TRL's SFTTrainer needs to train on finished tables.

    ``tables`` are the folders of token rows (documents, conversations, episodes) and of their
    ``teacher_logits``, in any encoding; ``settings`` are those of objective ``kd``. ``tokenizer``
    is the model's, or its folder: it has to be the tables'. SFTTrainer is to leave the rows as they
    are: ``SFTConfig(dataset_kwargs={"skip_prepare_dataset": True})``, without packing.

    Raises ConfigError for a wrong setting or other tables, IdentityMismatch for another tokenizer,
    and what ``open_dataset`` raises, whose ``verify`` it is.
    """
    try:
        objective = KdConfig(**settings)
    except ValidationError as error:
        (name, *_) = (*error.errors()[0]["loc"], "kd")
        raise ConfigError(f"distillation: {name}: {first_line(error)}") from error
    if objective.mixture is not None:
        raise ConfigError(
            "distillation: mixture: several teachers at once are for the train steps of recipes: "
            "leave it out and name one table of teacher_logits"
        )
    if objective.positions is not None:
        raise ConfigError(
            "distillation: positions: selected positions are for the train steps of recipes: leave "
            "it out"
        )
    dataset = open_dataset(tables, split="train", verify=verify)
    objective.require([(m.table, m.variant) for m in dataset.manifests], [])
    held_out = None
    if all(_has_held_out(manifest.shards) for manifest in dataset.manifests):
        held_out = open_dataset(tables, split=HELD_OUT, verify=False)
    with tempfile.TemporaryDirectory() as own:
        folder = _folder_of(tokenizer, Path(own))
        require_vocabulary("student", folder, dataset, "train a model with the teacher's tokenizer")
        known_ids, vocab_size = num_token_ids(folder), rows_needed(folder, dataset)
    rows = _NumberedRows(dataset, held_out)
    collator = Collator(encoding_of(dataset), vocab_size, known_ids)
    return {
        "train_dataset": _as_dataset(range(len(dataset))),
        "eval_dataset": held_out and _as_dataset(range(len(dataset), len(rows))),
        "data_collator": NumberedCollator(rows, Collator("", vocab_size)),
        "compute_loss_func": DistillationLoss(rows, collator, objective),
    }


def _has_held_out(shards: Any) -> bool:
    return any(shard.split == HELD_OUT and shard.num_rows for shard in shards)


def _folder_of(tokenizer: Tokenizer | Path | str, own: Path) -> Path:
    """Return a folder of its files: the one it was read from, or ``own`` with what it is now."""
    if isinstance(tokenizer, str | Path):
        return Path(tokenizer)
    source = Path(tokenizer.name_or_path or own)
    if (source / "tokenizer.json").is_file():
        return source
    tokenizer.save_pretrained(own)
    return own


def _as_dataset(numbers: range) -> Any:
    """Return rows that are their numbers; TRL takes them as a ``datasets.Dataset`` alone.

    One with a transform: TRL refuses in its own words to prepare that, and names the setting.
    """
    try:
        from datasets import Dataset
    except ModuleNotFoundError:
        return numbers
    column = {"input_ids": np.arange(numbers.start, numbers.stop)}
    return Dataset.from_dict(column).with_transform(_as_it_is)


def _as_it_is(columns: Any) -> Any:
    return columns


@dataclass(frozen=True, slots=True)
class _NumberedRows:
    """The rows of ``train``, then those of ``held_out``."""

    train: CachedDataset
    held_out: CachedDataset | None

    def __len__(self) -> int:
        return len(self.train) + (len(self.held_out) if self.held_out is not None else 0)

    def __getitem__(self, number: int) -> Row:
        if number < len(self.train):
            return self.train[number]
        assert self.held_out is not None, "a number of these rows"
        return self.held_out[number - len(self.train)]


@dataclass(frozen=True, slots=True)
class NumberedCollator:
    """Numbers of rows -> a model's ``input_ids``, ``attention_mask`` and ``labels`` [B, T], int64.

    Labels are the ids of scored tokens at their places and -100 elsewhere, but in ``labels[b, 0]``
    stands the number of the row. Rows are padded on the right.
    """

    rows: _NumberedRows
    collator: Collator

    def __call__(self, features: Sequence[int | Mapping[str, int]]) -> dict[str, Tensor]:
        """Read the rows, in the loader's worker."""
        numbers = [int(f["input_ids"] if isinstance(f, Mapping) else f) for f in features]
        rows = [self.rows[number] for number in numbers]
        batch = self.collator(rows)
        lengths_B = torch.tensor([len(row["input_ids_T"]) for row in rows])
        labels_BT = batch["labels"]
        labels_BT[:, 0] = torch.tensor(numbers)
        mask_BT = torch.arange(labels_BT.shape[1]) < lengths_B[:, None]
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": mask_BT.long(),
            "labels": labels_BT,
        }


@dataclass(frozen=True, slots=True)
class _LogitsStep:
    """The part of ``losses.step.Step`` that ``kd`` uses, over logits that are there already."""

    logits_BTV: Tensor
    teacher_head: LanguageHead | None

    def over_positions(self, batch: dict[str, Any], objective: PositionLoss) -> Term:
        logits_NV = self.logits_BTV.flatten(0, 1).index_select(0, batch["positions_N"])
        result = logits_loss(logits_NV, objective)
        return Term(result.loss, result.sums, "tokens")


@dataclass(slots=True)
class DistillationLoss:
    """``kd`` of a batch of ``NumberedCollator``: its sum over the step's count of scored tokens."""

    rows: _NumberedRows
    collator: Collator
    objective: KdConfig
    _heads: dict[torch.device, LanguageHead | None] = field(default_factory=dict)

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss; without ``num_items_in_batch`` it is the batch's own mean.

        Raises ConfigError for labels of another collator and for DataParallel, of which the Trainer
        multiplies this loss by the number of GPUs; IdentityMismatch for too few logits.
        """
        if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() > 1:
            raise ConfigError(
                f"this process trains on {len(num_items_in_batch)} GPUs at once (DataParallel): "
                f"start one process a GPU by torchrun or accelerate, or show it one GPU "
                f"(CUDA_VISIBLE_DEVICES)"
            )
        logits_BTV = outputs["logits"]
        batch = self._batch_of(labels)
        if logits_BTV.shape[-1] < self.collator.vocab_size:
            raise IdentityMismatch(
                f"the model has {logits_BTV.shape[-1]} logits, the data's ids need "
                f"{self.collator.vocab_size}: train a model with at least as many embedding rows"
            )
        device = logits_BTV.device
        on_device = {name: values.to(device) for name, values in batch.items()}
        step: Any = _LogitsStep(logits_BTV, self._head_on(device))
        terms = self.objective.terms(on_device, step)
        count = len(batch["positions_N"]) if num_items_in_batch is None else num_items_in_batch
        total = torch.stack([term.weight * term.total for term in terms]).sum()
        return total / torch.as_tensor(count, device=device).clamp(min=1)

    def _batch_of(self, labels_BT: Tensor) -> dict[str, Any]:
        """Decode the rows that the labels name, and hold the labels to their tokens."""
        numbers = labels_BT[:, 0].tolist() if labels_BT is not None else [-1]
        if min(numbers) >= 0 and max(numbers) < len(self.rows):
            batch = self.collator([self.rows[number] for number in numbers])
            found, expected = labels_BT[:, 1:].cpu(), batch["labels"][:, 1:]
            if torch.equal(found, expected):
                return batch
        raise ConfigError(
            "the labels are not those of this data set's rows: give the trainer data_collator, "
            "compute_loss_func and the data sets of one call of distillation, and no other collator"
        )

    def _head_on(self, device: torch.device) -> LanguageHead | None:
        if device not in self._heads:
            known_ids = self.collator.num_token_ids
            self._heads[device] = teacher_head_of(self.rows.train, device, known_ids)
        return self._heads[device]
