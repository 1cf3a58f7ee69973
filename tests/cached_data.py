"""A tiny teacher, a tiny student and the tables between them, for the trainer's tests.

Dimensions: T = tokens of a row, P = scored positions, V = vocabulary, K = kept entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from schemas.distribution import quantise_sticks, uniforms
from schemas.sample_id import sample_id_of
from schemas.storage.files import sha256_of
from schemas.storage.manifest import Manifest, write_manifest
from schemas.storage.records import ShardRecord, shard_name
from schemas.storage.shards import write_shard
from schemas.table import BoundTable
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.episodes import Episode
from schemas.tables.teacher_logits import (
    ENCODINGS,
    AnyLogits,
    ExactLogits,
    ThresholdLogits,
    TopKLogits,
)
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.signals.scoring.encoding import measure, threshold_sample, top_k

VOCAB_SIZE = 307  # prime: divisible by nothing
K = 8
LENGTHS = (24, 9, 17, 24, 13, 24, 2, 20, 24, 11, 24, 16)


@dataclass(frozen=True)
class CachedData:
    """Folders of one teacher's signals in every encoding, and of a student without training."""

    root: Path
    teacher: Path
    student: Path

    @property
    def documents(self) -> Path:
        return self.root / "documents"

    def tables(self, encoding: str) -> list[Path]:
        return [self.documents, self.root / encoding]


def make_cached_data(root: Path) -> CachedData:
    """Write teacher, student, documents and their ``teacher_logits`` in all three encodings."""
    data = CachedData(root, root / "teacher", root / "student")
    save_model(data.teacher, seed=1, num_layers=2)
    save_model(data.student, seed=2, num_layers=1)
    documents = make_documents()
    write_table(data.documents, DOCUMENTS.bind(vocab_size=VOCAB_SIZE), documents, data.teacher)
    for encoding in ENCODINGS:
        write_signals(data, encoding, documents)
    return data


def save_model(folder: Path, *, seed: int, num_layers: int, head_dim: int = 8) -> None:
    """Save a random llama and a word-level tokenizer; sharp logits, so that there is a teacher."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<end>": 0} | {f"w{i}": i for i in range(1, VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def make_documents() -> list[Document]:
    """Mixed lengths down to two tokens; the last quarter is held out."""
    rng = np.random.default_rng(0)
    documents = []
    for index, length in enumerate(LENGTHS * 2):
        ids_T = rng.integers(0, VOCAB_SIZE, length)
        split = "heldout" if index % 4 == 3 else "train"
        documents.append(Document(sample_id=sample_id_of(ids_T), split=split, input_ids_T=ids_T))
    return documents


def write_signals(data: CachedData, encoding: str, documents: Sequence[Document | Episode]) -> None:
    """Score the documents with the teacher and write the table, in another row order."""
    model = LlamaForCausalLM.from_pretrained(data.teacher).eval()
    folder = data.root / encoding
    rows = {document.sample_id: _encode(model, document, encoding) for document in documents}
    ordered = [rows[document.sample_id] for document in reversed(documents)]
    bound = ENCODINGS[encoding].bind(vocab_size=VOCAB_SIZE, sizes={"K": K, "D": 32})
    splits = {document.sample_id: document.split for document in documents}
    side_files: tuple[str, ...] = ()
    if encoding == "exact":
        head = LanguageHead.from_model_folder(
            data.teacher, device=torch.device("cpu"), dtype=torch.float32
        )
        folder.mkdir(parents=True)
        head.save(folder)
        side_files = tuple(path.name for path in folder.iterdir())
    write_table(folder, bound, ordered, data.teacher, splits=splits, side_files=side_files)


def write_table(
    folder: Path,
    bound: BoundTable[Any],
    rows: Sequence[Any],
    model: Path,
    *,
    splits: dict[str, str] | None = None,
    side_files: tuple[str, ...] = (),
) -> None:
    """Write two training shards and a held-out one, and the manifest."""
    split_of = {row.sample_id: (splits or {}).get(row.sample_id) or row.split for row in rows}
    train = [row for row in rows if split_of[row.sample_id] == "train"]
    heldout = [row for row in rows if split_of[row.sample_id] == "heldout"]
    half = len(train) // 2
    shards = []
    for index, (split, part) in enumerate(
        [("train", train[:half]), ("train", train[half:]), ("heldout", heldout)]
    ):
        name = shard_name(index, 3)
        written = write_shard(folder / f"{name}.arrow", bound, part)
        shards.append(
            ShardRecord(
                name=name,
                split=split,
                num_rows=written.num_rows,
                num_tokens=0,
                num_positions=0,
                num_bytes=written.num_bytes,
                sha256=written.sha256,
            )
        )
    manifest = Manifest(
        table=bound.table.name,
        version=bound.table.version,
        variant=bound.table.variant,
        fingerprint=f"fingerprint of {folder.name}",
        tokenizer=tokenizer_fingerprint(model),
        vocab_size=VOCAB_SIZE,
        identity={},
        shards=tuple(shards),
        files={name: sha256_of(folder / name) for name in side_files},
    )
    write_manifest(folder, manifest)


@torch.no_grad()
def _encode(model: Any, document: Document | Episode, encoding: str) -> AnyLogits:
    ids_T = torch.as_tensor(document.input_ids_T, dtype=torch.int64)
    output = model(input_ids=ids_T[None], output_hidden_states=True)
    logits_PV = output.logits[0, :-1].float().clone()
    measured = measure(logits_PV, ids_T[1:])
    common: dict[str, Any] = {
        "sample_id": document.sample_id,
        "first_target": 1,
        "next_token_logprobs_P": measured.next_token_logprobs_P.numpy(),
        "entropies_P": measured.entropies_P.numpy(),
    }
    if encoding == "exact":
        return ExactLogits(hidden_PD=output.hidden_states[-1][0, :-1].numpy(), **common)
    if encoding == "top_k":
        kept = top_k(measured, k=K)
        return TopKLogits(
            token_ids_PK=kept.token_ids_PK.numpy(),
            logprobs_PK=kept.logprobs_PK.numpy(),
            rest_logprobs_P=kept.rest_logprobs_P.numpy(),
            **common,
        )
    draws_PN = uniforms(int(document.sample_id[:8], 16), len(ids_T) - 1, K + 1)
    sample = threshold_sample(measured, torch.from_numpy(draws_PN[:, 0].copy()), k=K)
    codes_PK = quantise_sticks(sample.fractions_PK.numpy(), draws_PN[:, 1:])
    num_head_P = sample.num_head_P.numpy()
    return ThresholdLogits(
        token_ids_PK=sample.token_ids_PK.numpy(),
        num_head_P=num_head_P.astype(np.uint8),
        head_codes_E=codes_PK[np.arange(K) < num_head_P[:, None]],
        **common,
    )
