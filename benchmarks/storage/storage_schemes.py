"""The schemes that ``storage.py`` compares: what each takes on disk, and what it gives back.

Ours are real tables: rows go through ``stages.signals.teacher_logits.work`` and the shard writer,
records and a manifest are written, and what is compared is what is read back. ``bytes`` is the size
of every file of the documents table and of the signals, shared out over tokens; files that a table
has once (schema, footer, record, manifest) are shared out over a shard of 1,024 rows of 512 tokens,
which is the default size, as a benchmark's own shards are smaller.

Peers' bytes are their published payloads (``benchmarks.storage.peer_layouts``), without input ids,
offsets or files, so every comparison leans their way. Where they name a container (Parquet),
``container`` is its size.

Dimensions: R = rows, T = tokens of a row, C = positions of a chunk, P = positions, K = kept
entries, V = vocabulary, D = width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.storage import peer_layouts
from benchmarks.storage.real_positions import ROW_TOKENS, Domain, Seen
from benchmarks.storage.signal_error import Decoded
from pipeline.executors.shard_task import RowCount, write_output
from schemas.distribution import unpack_top_k, weighted_tokens
from schemas.sample_id import sample_id_of
from schemas.storage.manifest import Manifest, write_manifest
from schemas.storage.records import shard_name
from schemas.storage.shards import read_shard
from schemas.table import BoundTable
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.teacher_logits import ExactLogits, TopKLogits
from stages.models.causal_lm.language_head import LanguageHead
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.signals.teacher_logits.work import score_shard

SHARD_TOKENS = 1024 * ROW_TOKENS
CHUNK = 128


@dataclass
class Scheme:
    """One way to keep distributions, over the rows of one domain.

    ``rows`` holds, for each row, the decoded entries, or the hidden states that stand for all.
    """

    name: str
    family: str
    entries: float
    bytes: float
    rows: list[Decoded | Tensor]
    container: float | None = None


class CachedEngine:
    """Hidden states computed before, as an engine: one teacher pass serves every encoding."""

    kind = "transformers"
    device = torch.device("cpu")

    def __init__(self, seen: Seen) -> None:
        """Serve the rows of ``seen`` in order."""
        self.max_length = ROW_TOKENS
        self.head = seen.head
        self._hidden_RTD = seen.hidden_RTD

    def hidden_states(self, sequences: Sequence[Any]) -> Iterator[Tensor]:
        """Yield [T, D] of each row."""
        assert len(sequences) == len(self._hidden_RTD)
        yield from self._hidden_RTD

    def close(self) -> None:
        """Nothing to free."""


def stored_schemes(
    domain: Domain, seen: Seen, folder: Path, encodings: Sequence[Mapping[str, Any]]
) -> list[Scheme]:
    """Write the documents and one table for each encoding; return what is read back."""
    vocab_size, width = seen.head.weight_VD.shape
    documents = [
        Document(sample_id=sample_id_of(ids_T), split="train", input_ids_T=ids_T)
        for ids_T in domain.measured_RT.numpy()
    ]
    bound = DOCUMENTS.bind(vocab_size=vocab_size)
    for_documents = write_table(folder / "documents", bound, documents)
    shard = read_shard(folder / "documents" / f"{shard_name(0, 1)}.arrow")
    schemes = []
    for encoding in encodings:
        fields = {"stage": "teacher_logits", "input": "-", "model": "-", "encoding": encoding}
        stage = TeacherLogitsStage.model_validate(fields)
        sizes = {"K": int(encoding.get("k", 0)), "D": width}
        place = folder / "-".join(map(str, encoding.values()))
        rows = score_shard(stage, CachedEngine(seen), shard)
        size = write_table(place, stage.table.bind(vocab_size=vocab_size, sizes=sizes), rows)
        schemes += list(_read_back(place, stage, for_documents + size))
    return schemes


def write_table(folder: Path, bound: BoundTable[Any], rows: Any) -> float:
    """Write shard, record and manifest; return bytes a token at the default shard size."""
    num_tokens, size = _write(folder, bound, rows)
    _, fixed = _write(folder.with_name(f"{folder.name}-empty"), bound, [])
    return (size - fixed) / num_tokens + fixed / SHARD_TOKENS


def _write(folder: Path, bound: BoundTable[Any], rows: Any) -> tuple[int, int]:
    counted = RowCount(rows)
    record = write_output(folder, shard_name(0, 1), bound, counted, split="train", made_by={})
    assert not record.rejects
    manifest = Manifest(
        table=bound.table.name,
        version=bound.table.version,
        variant=bound.table.variant,
        fingerprint="0" * 64,
        tokenizer="0" * 64,
        vocab_size=bound.vocab_size,
        identity={},
        shards=(record,),
    )
    write_manifest(folder, manifest)
    return record.num_tokens, sum(path.stat().st_size for path in folder.iterdir())


def _read_back(folder: Path, stage: TeacherLogitsStage, size: float) -> Iterator[Scheme]:
    """Yield the scheme of a table, or two for ``top_k``: with the rest, and renormalised."""
    table = read_shard(folder / f"{shard_name(0, 1)}.arrow")
    rows = [row for batch in table.to_batches() for row in stage.table.rows(batch)]
    k = getattr(stage.encoding, "k", 0)
    kept: list[Decoded | Tensor]
    match stage.encoding.kind:
        case "threshold":
            kept = [_decoded(*weighted_tokens(asdict(row))) for row in rows]
            if tau := stage.encoding.tau:
                counts = [row.num_head_P.astype(int) + row.num_tail_P for row in rows]
                mean_k = float(np.concatenate(counts).mean())
                yield Scheme(f"tau {tau:g}", "tau (ours)", mean_k, size, kept)
            else:
                yield Scheme(f"threshold {k}", "threshold (ours)", k, size, kept)
        case "top_k":
            kept = [_top_k(row) for row in rows]
            yield Scheme(f"top_k {k} + rest", "top-k + rest (ours)", k, size, kept)
        case "exact":
            kept = [_exact(row) for row in rows]
            yield Scheme("exact", "exact (ours)", float("nan"), size, kept)


def _top_k(row: TopKLogits) -> Decoded:
    probs_PK, rest_P = unpack_top_k(row.logprobs_PK, row.rest_logprobs_P)
    ids_PK = torch.from_numpy(row.token_ids_PK.astype(np.int64))
    return Decoded(ids_PK, torch.from_numpy(probs_PK), torch.from_numpy(rest_P), "bucket")


def _exact(row: ExactLogits) -> Tensor:
    return torch.from_numpy(row.hidden_PD.astype(np.float32))


def _decoded(ids_PK: Any, weights_PK: Any) -> Decoded:
    ids_PK = torch.from_numpy(np.asarray(ids_PK, np.int64))
    weights_PK = torch.from_numpy(np.asarray(weights_PK, np.float32))
    return Decoded(ids_PK, weights_PK, torch.zeros(len(ids_PK)))


@dataclass
class PeerRows:
    """What the peers' layouts keep of one domain, gathered chunk by chunk."""

    decoded: dict[str, list[list[Decoded]]] = field(default_factory=dict)
    payload: dict[str, float] = field(default_factory=dict)
    packed: dict[str, list[list[Any]]] = field(default_factory=dict)

    def add(self, name: str, row: int, decoded: Decoded, num_bytes: float) -> None:
        """Count one chunk of row ``row``."""
        rows = self.decoded.setdefault(name, [])
        if row == len(rows):
            rows.append([])
        rows[row].append(decoded)
        self.payload[name] = self.payload.get(name, 0.0) + num_bytes


def peer_schemes(
    seen: Seen, folder: Path, *, draws: Sequence[int], top_k: Sequence[int]
) -> list[Scheme]:
    """Encode one domain in the peers' layouts, to bytes and back."""
    rows = PeerRows()
    for row, hidden_TD in enumerate(seen.hidden_RTD):
        for start in range(0, ROW_TOKENS - 1, CHUNK):
            stop = min(start + CHUNK, ROW_TOKENS - 1)
            logprobs_CV = seen.head.logits(hidden_TD[start:stop]).log_softmax(-1)
            _add_draws(rows, row, logprobs_CV, draws, seed=row * ROW_TOKENS + start)
            _add_largest(rows, row, logprobs_CV, top_k)
    num_tokens = seen.hidden_RTD.shape[0] * ROW_TOKENS
    schemes = []
    for name, decoded in rows.decoded.items():
        family, entries = _family(name)
        kept: list[Decoded | Tensor] = [_joined(chunks) for chunks in decoded]
        scheme = Scheme(name, family, entries, rows.payload[name] / num_tokens, kept)
        if packed := rows.packed.get(name.rsplit(",", 1)[0]):
            scheme.container = _parquet_bytes(folder / "peer.parquet", packed) / num_tokens
        if family == "RS-KD":
            scheme.entries = scheme.bytes / 3
        schemes.append(scheme)
    return schemes


def _add_draws(
    rows: PeerRows, row: int, logprobs_CV: Tensor, draws: Sequence[int], *, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs_CV = logprobs_CV.exp()
    for num_draws in draws:
        drawn = torch.multinomial(probs_CV, num_draws, replacement=True, generator=generator)
        packed, distinct_C = peer_layouts.pack_draws(drawn.numpy())
        ids_CK, weights_CK = peer_layouts.unpack_draws(packed, distinct_C, num_draws=num_draws)
        rows.add(f"RS-KD {num_draws} draws", row, _decoded(ids_CK, weights_CK), len(packed))


def _add_largest(rows: PeerRows, row: int, logprobs_CV: Tensor, top_k: Sequence[int]) -> None:
    vocab_size = logprobs_CV.shape[1]
    largest_CK, ids_CK = logprobs_CV.topk(128, dim=-1)
    for k in top_k:
        halves = peer_layouts.to_bfloat16(largest_CK[:, :k].numpy())
        probs_CK = torch.from_numpy(peer_layouts.from_bfloat16(halves)).exp()
        weights_CK = probs_CK / probs_CK.sum(1, keepdim=True)
        decoded = _decoded(ids_CK[:, :k].numpy(), weights_CK.numpy())
        rows.add(f"top-k {k} renormalised", row, decoded, 4 * k * len(probs_CK))
    for layout in (peer_layouts.recommended(vocab_size), peer_layouts.budget(vocab_size)):
        k, name = layout.k, f"polynomial top-k {layout.k}"
        packed = layout.pack(ids_CK[:, :k].numpy(), largest_CK[:, :k].numpy())
        ids, logprobs = layout.unpack(packed)
        plain = _decoded(ids, np.exp(logprobs))
        rest_C = (1.0 - plain.weights_CK.sum(1)).clamp(min=0.0)
        even = Decoded(plain.token_ids_CK, plain.weights_CK, rest_C, "uniform")
        rows.add(f"{name}, rest zero", row, plain, packed.size)
        rows.add(f"{name}, rest uniform", row, even, packed.size)
        in_rows = rows.packed.setdefault(name, [])
        if row == len(in_rows):
            in_rows.append([])
        in_rows[row].append(packed)


def _family(name: str) -> tuple[str, float]:
    number = float(next(word.rstrip(",") for word in name.split() if word.rstrip(",").isdigit()))
    if name.startswith("RS-KD"):
        return "RS-KD", number
    rule = name.split(", ")[-1] if "," in name else "bf16, renormalised"
    start = "polynomial top-k" if name.startswith("polynomial") else "top-k"
    return f"{start}, {rule}", number


def _joined(chunks: Sequence[Decoded]) -> Decoded:
    """Join the chunks of a row; RS-KD's differ in width."""
    width = max(chunk.token_ids_CK.shape[1] for chunk in chunks)
    padded = [width - chunk.token_ids_CK.shape[1] for chunk in chunks]
    both = list(zip(chunks, padded, strict=True))
    pad = torch.nn.functional.pad
    return Decoded(
        torch.cat([pad(chunk.token_ids_CK, (0, extra)) for chunk, extra in both]),
        torch.cat([pad(chunk.weights_CK, (0, extra)) for chunk, extra in both]),
        torch.cat([chunk.rest_C for chunk in chunks]),
        chunks[0].rest,
    )


def _parquet_bytes(path: Path, packed: list[list[Any]]) -> int:
    table = peer_layouts.byte_lists([np.concatenate(chunks) for chunks in packed])
    pq.write_table(table, path)
    return path.stat().st_size


def draws_for(head: LanguageHead, hidden_PD: Tensor, max_bytes: float) -> int:
    """Return the most draws whose expected payload on these positions is within ``max_bytes``."""
    probs_PV = head.logits(hidden_PD).softmax(-1)
    log_missed_PV = torch.log1p(-probs_PV.clamp(max=1 - 1e-7))
    expected = [float(3 * -torch.expm1(n * log_missed_PV).sum(1).mean()) for n in range(1, 128)]
    return max(n for n, size in enumerate(expected, 1) if size <= max_bytes)
