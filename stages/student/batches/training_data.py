"""What a training run has to make batches of, and the heads beside its ``exact`` tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from schemas.dataset import CachedDataset
from schemas.tables.prompted.advantages import HEAD_FOLDERS
from schemas.tables.teacher_logits import WHOLE
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.encoder_decoder.halves import Frame
from stages.student.batches.several_datasets import SeveralDatasets
from stages.student.batches.signals import (
    Collator,
    SignalRows,
    encoding_of,
)
from stages.student.batches.teachers import TaughtCollator, taught_collator


class Batches(NamedTuple):
    """The rows of a run, for torch's loaders, and what makes a batch of some of them."""

    rows: Any
    collate: Callable[[Sequence[Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The opened tables of a run; an objective says what it makes of them.

    ``vocab_size`` is the student's, ``seed`` and ``packing`` the run's. Ids from ``num_token_ids``
    on are no token's (None: not known). ``reader_frame`` is that of a reader that is an
    encoder-decoder.
    """

    dataset: CachedDataset
    lm_dataset: CachedDataset | None
    vocab_size: int
    seed: int
    num_token_ids: int | None = None
    packing: bool = False
    reader_frame: Frame | None = None

    def rows(self, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> Batches:
        """Return the joined rows of ``dataset``, to be collated so."""
        return Batches(SignalRows(self.dataset), collate)

    def tokens(self) -> Collator:
        """Return what decodes token ids alone."""
        return Collator("", self.vocab_size, packing=self.packing)

    def signals(self) -> Collator:
        """Return what decodes token ids and the teacher's distributions, if there are any."""
        encoding = encoding_of(self.dataset)
        return Collator(encoding, self.vocab_size, self.num_token_ids, self.packing)

    def taught(self) -> Collator | TaughtCollator:
        """Return the same of one teacher or of several: see ``batches.teachers``."""
        if isinstance(self.dataset, SeveralDatasets):
            return taught_collator(self.dataset, self.tokens(), self.num_token_ids)
        return self.signals()

    def text(self, *, teacher: bool) -> Collator | None:
        """Return what decodes ``lm_dataset``, its distributions too with ``teacher``."""
        if self.lm_dataset is None:
            return None
        encoding = encoding_of(self.lm_dataset) if teacher else ""
        return Collator(encoding, self.vocab_size, self.num_token_ids)


def teacher_head_of(
    dataset: CachedDataset, device: torch.device, num_token_ids: int | None = None
) -> LanguageHead | None:
    """Load the head that lies beside an ``exact`` table, in the teacher's dtype; else None."""
    return next(iter(teacher_heads_of(dataset, device, num_token_ids).values()), None)


def teacher_heads_of(
    dataset: CachedDataset, device: torch.device, num_token_ids: int | None = None
) -> dict[int, LanguageHead]:
    """Load the head of each ``exact`` table of a teacher, by the table's place in the data."""
    places = _tables_of(dataset, "teacher_logits", WHOLE)
    return {at: _loaded(dataset.local_folder(at), device, num_token_ids) for at in places}


def _loaded(folder: Path, device: torch.device, num_token_ids: int | None) -> LanguageHead:
    return replace(LanguageHead.load(folder, device=device), num_token_ids=num_token_ids)


def advantage_heads_of(
    dataset: CachedDataset, device: torch.device, num_token_ids: int | None = None
) -> tuple[LanguageHead, LanguageHead] | None:
    """Load the aligned teacher's and the reference's head of ``exact`` advantages; else None."""
    places = _tables_of(dataset, "advantages", ("exact",))
    if not places:
        return None
    folder = dataset.local_folder(places[0])
    teacher, reference = (_loaded(folder / name, device, num_token_ids) for name in HEAD_FOLDERS)
    return teacher, reference


def _tables_of(dataset: CachedDataset, table: str, variants: Sequence[str]) -> list[int]:
    kinds = [(manifest.table, manifest.variant) for manifest in dataset.manifests]
    return [at for at, (name, variant) in enumerate(kinds) if name == table and variant in variants]
