"""Bytes a token of ``teacher_logits`` at larger vocabularies, by column, measured on tables.

No model of such a vocabulary comes with the assets. Real positions of SmolLM2-135M are carried
there: every token keeps its probability and gets another id (``carried_ids`` says which), in the
teacher's distributions and in the rows of text. Tables are then written by the product, with the
schema of that vocabulary. ``--docs FOLDER`` writes ``vocabularies.md`` there.

Dimensions: R = rows, T = tokens of a row, P = positions, D = hidden width, V = SmolLM2's
vocabulary, U = a larger one.
"""

import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.bars import benchmark_parser, finish, markdown_table
from benchmarks.storage.carried_ids import PUBLISHED, Carried, by_text, spread
from benchmarks.storage.column_bytes import ELSE, bytes_by_column
from benchmarks.storage.real_positions import (
    MODEL,
    ROW_TOKENS,
    Domain,
    Seen,
    load_domains,
    missing_asset,
    see,
)
from benchmarks.storage.storage_schemes import CachedEngine, write_table
from examples.fetch_assets import FetchError
from schemas.sample_id import sample_id_of
from schemas.storage.records import shard_name
from schemas.storage.shards import read_shard
from schemas.tables.documents import DOCUMENTS, Document
from stages.models.causal_lm.language_head import LanguageHead
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.signals.teacher_logits.work import score_shard

_KEPT_IDS = "token_ids_PK"
LARGER = (131_072, 151_936, 262_144)
ENCODINGS: dict[str, dict[str, Any]] = {
    "k = 16": {"kind": "threshold", "k": 16},
    "tau = 0.04": {"kind": "threshold", "tau": 0.04},
}

PAGE = """# Bytes a token at other vocabularies

Regenerate with `python benchmarks/storage/vocabularies.py --docs docs/measured/` (the figures below
come from that run; `--quick` measures less). {tokens:,} tokens of each kind of text ({domains}), in
rows of {row_tokens}; means over kinds.

**What is real and what is not.** The positions are real: SmolLM2-135M-Instruct's distributions over
its 49,152 tokens on real text. The vocabularies are not its own. Each of its tokens keeps its
probability and is given another id, in the distributions and in the rows of text, and what is
counted are tables that the product wrote with those ids and that vocabulary's schema. Where the
larger vocabulary has tokens that SmolLM2 lacks, they have no probability here; a model of it would
share some out to them, and would cut the same text into fewer tokens. So the shape of the
distributions, and with it the number of entries, is SmolLM2's.

- "Tekken" (131,072, of Mistral) and "Qwen" (151,936): a token gets the id that this published
  tokenizer gives to the same bytes. {matched}. The others get free ids near their rank.
- "spread": rank is kept, id i of 49,152 going to a random place from i / 49,152 to (i + 1) / 49,152
  of the larger vocabulary. For 262,144 there is this alone: no tokenizer of that size was at hand
  whose terms ask for nothing. Where both ways are below, they tell how far spreading is off.

Everything is counted, as in [storage.md](storage.md): input ids, sample ids, offsets, schema,
record and manifest, what a table has once shared out over a shard of the default size.

{totals}

What ids cost more, at k = 16, in bits an id beside those that the vocabulary has more:

{growth}

All take more than the vocabulary's logarithm says; why was not looked into. With tau the low bytes
of gaps are as large everywhere: what is added lies in the high ones and in the ids of heads.

## By column, k = 16

{fixed}

## By column, tau = 0.04

{follows}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write vocabularies.md there")
    options = parser.parse_args(arguments)
    cache: Path = options.cache
    if missing := missing_asset(cache):
        print(missing)
        return 2
    domains = load_domains(cache, 16)[: 1 if options.quick else None]
    rows_RT = torch.cat([domain.measured_RT for domain in domains])
    print(f"running the teacher over {rows_RT.numel()} tokens", flush=True)
    seen = see(cache / MODEL, rows_RT, cache)
    num_tokens = seen.head.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(cache / MODEL, local_files_only=True)
    own = Carried("SmolLM2", num_tokens, np.arange(num_tokens), np.ones(num_tokens, bool))
    try:
        texts = [by_text(published, tokenizer, num_tokens, cache) for published in PUBLISHED]
    except FetchError as error:
        print(error)
        return 2
    ways = sorted(
        [*texts, *(spread(num_tokens, size) for size in LARGER)], key=lambda w: w.vocab_size
    )
    tables = []
    with tempfile.TemporaryDirectory(prefix="vocabularies-") as scratch:
        for way in [own, *ways[-1:]] if options.quick else [own, *ways]:
            print(f"writing {way.vocab_size:,}, {way.name}", flush=True)
            tables += measure(way, domains, seen, Path(scratch))
    rows = [table.row() for table in tables]
    if options.docs is not None:
        write_page(options.docs, tables, texts, domains)
    return finish([], rows, options.json)


@dataclass(frozen=True)
class Measured:
    """One way and encoding: bytes a token, in all and by column, means over kinds of text."""

    way: Carried
    encoding: str
    total: float
    columns: Mapping[str, float]

    def row(self, *, columns: bool = True) -> dict[str, Any]:
        """Return what a table shows of it."""
        place = {"vocabulary": f"{self.way.vocab_size:,}", "ids": self.way.name}
        named = {"encoding": self.encoding, "bytes / token": self.total}
        return place | named | (dict(self.columns) if columns else {})


def measure(way: Carried, domains: Sequence[Domain], seen: Seen, folder: Path) -> list[Measured]:
    """Write all tables of one way."""
    head = CarriedHead.of(seen.head, way)
    parts: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in ENCODINGS}
    hidden = torch.split(seen.hidden_RTD, len(domains[0].measured_RT))
    for domain, hidden_RTD in zip(domains, hidden, strict=True):
        place = folder / f"{way.vocab_size}-{way.name}-{domain.name}"
        ids_RT = way.ids_V[domain.measured_RT.numpy()]
        documents = [
            Document(sample_id=sample_id_of(ids_T), split="train", input_ids_T=ids_T)
            for ids_T in ids_RT
        ]
        bound = DOCUMENTS.bind(vocab_size=way.vocab_size)
        text_bytes = write_table(place / "documents", bound, documents)
        text_columns = columns_of(place / "documents", ids_RT.size, DOCUMENTS.zstd_level)
        shard = read_shard(place / "documents" / f"{shard_name(0, 1)}.arrow")
        for name, encoding in ENCODINGS.items():
            fields = {"stage": "teacher_logits", "input": "-", "model": "-", "encoding": encoding}
            stage = TeacherLogitsStage.model_validate(fields)
            sizes = {"K": int(encoding.get("k", 0))}
            bound_signals = stage.table.bind(vocab_size=way.vocab_size, sizes=sizes)
            rows = score_shard(stage, CachedEngine(Seen(hidden_RTD, head)), shard)
            total = text_bytes + write_table(place / name, bound_signals, rows)
            columns = columns_of(place / name, ids_RT.size, stage.table.zstd_level)
            columns = {"input_ids_T": text_columns["input_ids_T"], **columns}
            columns["all else"] = total - sum(columns.values())
            parts[name].append((total, columns))
    return [_mean(way, name, of_domains) for name, of_domains in parts.items()]


def _mean(way: Carried, name: str, parts: Sequence[tuple[float, dict[str, float]]]) -> Measured:
    columns = {
        column: float(np.mean([columns[column] for _, columns in parts])) for column in parts[0][1]
    }
    return Measured(way, name, float(np.mean([total for total, _ in parts])), columns)


def columns_of(folder: Path, num_tokens: int, zstd_level: int) -> dict[str, float]:
    """Return the bytes a token of each column of arrays of a shard."""
    sizes = bytes_by_column(folder / f"{shard_name(0, 1)}.arrow", zstd_level)
    arrays = {name: size for name, size in sizes.items() if name[-2:-1] == "_" or "_PK" in name}
    assert ELSE not in arrays
    return {name: size / num_tokens for name, size in arrays.items()}


@dataclass(frozen=True)
class CarriedHead(LanguageHead):
    """A head whose logits lie at other ids of a larger vocabulary; the ids between have none."""

    base: LanguageHead | None = None
    ids_V: Tensor | None = None

    @classmethod
    def of(cls, head: LanguageHead, way: Carried) -> "CarriedHead":
        """Carry ``head``."""
        weight_UD = torch.zeros(1, 1).expand(way.vocab_size, 1)  # its length alone is read
        ids_V = torch.from_numpy(way.ids_V)
        return cls(weight_UD, None, 1.0, None, torch.float32, base=head, ids_V=ids_V)

    @torch.no_grad()
    def logits(self, hidden_PD: Tensor, *, out_PV: Tensor | None = None) -> Tensor:
        """Return [P, U] float32 logits, -inf where no token was carried to."""
        assert self.base is not None and self.ids_V is not None
        found_PV = self.base.logits(hidden_PD)
        if out_PV is None:
            out_PV = torch.empty(len(found_PV), self.vocab_size)
        out_PU = out_PV[: len(found_PV)].fill_(-torch.inf)
        return out_PU.scatter_(1, self.ids_V.expand(len(found_PV), -1), found_PV)


def write_page(
    folder: Path,
    tables: Sequence[Measured],
    texts: Sequence[Carried],
    domains: Sequence[Domain],
) -> None:
    """Write ``vocabularies.md``."""
    rows_RT = torch.cat([domain.measured_RT for domain in domains])
    matched = "; ".join(
        f"{way.name} has {way.same_text_V.mean():.0%} of SmolLM2's tokens, which are "
        f"{way.same_text_V[rows_RT.numpy()].mean():.1%} of the text"
        for way in texts
    )
    by_encoding = {
        name: markdown_table([_columns_row(t) for t in tables if t.encoding == name])
        for name in ENCODINGS
    }
    page = PAGE.format(
        tokens=rows_RT.numel() // len(domains),
        domains=", ".join(domain.name for domain in domains),
        row_tokens=ROW_TOKENS,
        matched=matched,
        totals=markdown_table([table.row(columns=False) for table in tables]),
        growth=markdown_table(growth_of([t for t in tables if t.encoding == "k = 16"])),
        fixed=by_encoding["k = 16"],
        follows=by_encoding["tau = 0.04"],
    )
    (folder / "vocabularies.md").write_text(page)


def growth_of(tables: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return what an id of k = 16 takes more than at SmolLM2's own vocabulary, in bits."""
    own = next(table for table in tables if table.way.name == "SmolLM2")
    return [
        {
            "vocabulary": f"{table.way.vocab_size:,}",
            "ids": table.way.name,
            "measured": 8 * (table.columns[_KEPT_IDS] - own.columns[_KEPT_IDS]) / 16,
            "of the vocabulary": math.log2(table.way.vocab_size / own.way.vocab_size),
            "bytes, 49,152 = 1": table.total / own.total,
        }
        for table in tables
        if table is not own
    ]


def _columns_row(table: Measured) -> dict[str, Any]:
    return {name: value for name, value in table.row().items() if name != "encoding"}


if __name__ == "__main__":
    sys.exit(main())
