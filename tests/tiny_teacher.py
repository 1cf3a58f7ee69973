"""A tiny teacher with documents of its own, and ways to run the ``teacher_logits`` stage on them.

Dimensions: T = tokens, P = scored positions, V = vocabulary, D = hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import AutoTokenizer

from schemas.distribution import unpack_threshold
from schemas.sample_id import sample_id_of
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.teacher_logits import ThresholdLogits
from stages.models.engines.engine import Engine
from stages.models.spec import EngineOptions, ModelSpec
from stages.signals.teacher_logits import work as scoring
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.stage import StageContext

F64Array = npt.NDArray[np.float64]
K = 8
LENGTHS = (2, 40, 7, 18)
ENCODINGS = ("threshold", "top_k", "exact")
# What two float32 forward passes of other batches, and rounding to float16, may differ by.
CLOSE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3}


def stage_of(kind: str, *, seed: int = 0) -> TeacherLogitsStage:
    encoding = {"kind": kind} if kind == "exact" else {"kind": kind, "k": K}
    body = {"stage": "teacher_logits", "input": "documents", "model": "m", "encoding": encoding}
    return TeacherLogitsStage.model_validate({**body, "seed": seed})


@dataclass(frozen=True)
class Teacher:
    """A model folder, documents of mixed lengths, and what a plain forward pass says of them."""

    folder: Path
    vocab_size: int
    documents: list[Document]
    logprobs_PV: list[F64Array]
    hidden_PD: list[F64Array]

    def context(self, out: Path) -> StageContext:
        model = ModelSpec(self.folder, "float32", "transformers", 64)
        options = EngineOptions(device="cpu", cache_dir=out / "head_check")
        return StageContext(out, self.vocab_size, {"m": model}, options)

    def rows(self, kind: str, out: Path) -> list[Any]:
        """Run the stage as a worker does: open it, give it one shard."""
        with stage_of(kind).open(self.context(out)) as work:
            return list(work(shard_of(self.documents, self.vocab_size)))

    def draw(self, engine: Engine, kind: str, *, seed: int = 0) -> list[Any]:
        """Run the stage's work on an engine that is open already."""
        shard = shard_of(self.documents, self.vocab_size)
        return list(scoring.score_shard(stage_of(kind, seed=seed), engine, shard))


def weights_of(row: ThresholdLogits) -> npt.NDArray[np.float32]:
    return unpack_threshold(row.token_ids_PK, row.num_head_P, row.head_codes_E)


def shard_of(documents: Sequence[Document], vocab_size: int) -> pa.Table:
    return pa.Table.from_batches([DOCUMENTS.bind(vocab_size=vocab_size).to_batch(documents)])


def as_document(ids_T: npt.NDArray[Any]) -> Document:
    return Document(sample_id=sample_id_of(ids_T), split="train", input_ids_T=ids_T)


def real_documents(folder: Path, paragraphs: Sequence[str]) -> list[Document]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(text)["input_ids"] for text in paragraphs[: len(LENGTHS)]]
    cut = [np.asarray(ids[:length]) for ids, length in zip(texts, LENGTHS, strict=True)]
    assert tuple(map(len, cut)) == LENGTHS
    return [as_document(ids_T) for ids_T in cut]
