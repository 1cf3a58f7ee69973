"""The packed layout against the plain one: bytes a token, what each column takes, time to read.

The rows of ``storage.py``, its three kinds of text in one shard, at the default tau, written twice.
Rows read back are equal bit for bit, so the errors of ``storage.md`` at this tau are those of both.
Priors, which a shard has once, are shared out over the few tokens of this one, not over those of a
shard of the default size (524,288), where they take a tenth of that or less.

Reading is timed on one core, record batch by record batch, after a first one: what a shard is
opened with is apart. ``--docs FOLDER`` also writes ``packed.md`` there.

Bars: packed takes at most 24 bytes a token with everything counted, at most 0.9 of plain's, reads
500,000 tokens a second, and no row differs.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.bars import (
    Bar,
    at_least,
    at_most,
    bars_table,
    benchmark_parser,
    finish,
    machine,
    markdown_table,
)
from benchmarks.storage.real_positions import (
    MODEL,
    ROW_TOKENS,
    SOURCES,
    load_domains,
    missing_asset,
    see,
)
from benchmarks.storage.storage_schemes import CachedEngine, write_table
from schemas.packing.batches import counted, open_batches
from schemas.packing.coder import Counter
from schemas.packing.entries import walk
from schemas.packing.priors import LEVELS, Priors
from schemas.sample_id import sample_id_of
from schemas.storage.records import shard_name
from schemas.table import CAPTURE_ZSTD_LEVEL
from schemas.tables.documents import DOCUMENTS, Document
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.signals.teacher_logits.work import score_shard

MAX_BYTES, MAX_RATIO, MIN_TOKENS_PER_S = 24.0, 0.9, 500_000.0
ROWS_PER_KIND, REPEATS = 16, 50
STAGE = TeacherLogitsStage.model_validate(
    {"stage": "teacher_logits", "input": "-", "model": "-", "encoding": {"kind": "threshold"}}
)
# What a row holds: its plain columns, and how the names of its packed streams begin.
COLUMNS = {
    "head counts": (("num_head_P",), "heads"),
    "tail counts": (("num_tail_P",), "tails"),
    "head codes": (("head_codes_H",), "codes"),
    "head ids": (("head_ids_H",), "head_id"),
    "tail ids": (("tail_gaps_low_E", "tail_gaps_high_E"), "split"),
    "entropies": (("entropies_P",), "entropies"),
    "next-token log-probs": (("next_token_logprobs_P",), "next_token"),
}
PAGE = """# The packed layout

Regenerate with `python benchmarks/storage/packed.py --docs docs/measured/` (the figures below come
from that run, on {machine}).

`encoding: {{kind: threshold, layout: packed}}` stores the rows of `threshold` with tau in one
binary value a record batch, coded by ANS (the package
[constriction](https://github.com/bamler-lab/constriction): MIT, Apache-2.0 or BSL-1.0; wheels for
Linux on x86-64, macOS and Windows) under counts that each shard has of its own symbols. Rows are
equal bit for bit, so errors are those of the plain layout ([storage](storage.md)): at tau 0.04,
0.94x and 0.92x the gradient error of k = 16.

## Bars

{bars}

## Layouts

SmolLM2-135M-Instruct, {tokens} tokens each of web pages, an encyclopaedia and chat in one shard.
*Bytes a token* are of every file of the documents table and the signals. The priors are shared out
over the tokens of this shard; over the 524,288 of a shard of the default size they take less, and
fit less closely: with priors of 120 other rows in the place of their own, the symbols of these rows
took 18.6 bytes a position, not 18.1.
Reading is timed on one core, from the file to Arrow columns, once a shard is opened and the models
of its symbols are made, in processor time: each record batch the best of 50 times, as the machine
had other work. Passes over all of them, the best of nine, gave 444,000 and 446,000 tokens a second
while other programs kept both cores busy (a load of 15 to 20), which is under the bar.

{layouts}

A reader opens a record batch (16 rows) to reach one row. So rows in random order cost that much
each, and a loader whose rows are in no order reads a packed table as many times slower as the table
above says: keep `plain` where few cores feed many rows a second. A reader holds 2.2 MB
of models for each packed shard that it keeps open (64 at most).

## Where the bytes go

Bytes a token by column: plain after zstd at the table's level; packed as the logarithms of the
weights that the priors give the symbols, without the priors' own bytes.

{columns}

A position's tail is a set: of m ids, log2 m! bits are saved by coding how many of them lie in each
half, quarter, ... of the vocabulary, halves by weight. What the head leaves over nearly tells the
number of tail entries, and a head code is known better from the one before it.

## What did not pay

Probes on the same rows, with priors of 120 others (they are not part of the script).

- More contexts: head codes under the whole code before them, log-probs under 561 contexts in the
  place of 153. 0.4 % fewer bytes, about a fifth more time: a call of the coder that makes few
  symbols is most of what it costs.
- 128 leaves of tail ids in the place of 64: 0.2 % fewer bytes for one more round.
- Eight priors of tail ids, each for a kind of position (a mixture fitted by EM, its index stored):
  0.7 bytes a token less. But the fit takes passes over all rows of a shard, and each shard would
  hold eight counts of every id.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write packed.md there")
    options = parser.parse_args(arguments)
    if missing := missing_asset(options.cache):
        print(missing)
        return 2
    names = tuple(SOURCES)[:1] if options.quick else tuple(SOURCES)
    documents, rows, vocab_size = scored(options.cache, names, ROWS_PER_KIND)
    with tempfile.TemporaryDirectory(prefix="packed-") as scratch:
        layouts, columns, num_different = measure(documents, rows, vocab_size, Path(scratch))
    bars = judge(layouts, num_different)
    if options.docs:
        write_page(options.docs, layouts, columns, bars)
    return finish(bars, [*layouts, *columns], options.json)


def write_page(
    folder: Path,
    layouts: Sequence[dict[str, Any]],
    columns: Sequence[dict[str, Any]],
    bars: Sequence[Bar],
) -> None:
    """Write ``packed.md``."""
    page = PAGE.format(
        machine=machine(),
        bars=bars_table(bars),
        tokens=f"{ROWS_PER_KIND * ROW_TOKENS:,}",
        layouts=markdown_table(layouts),
        columns=markdown_table(columns),
    )
    (folder / "packed.md").write_text(page, encoding="utf-8")


def scored(
    cache: Path, names: Sequence[str], per_kind: int
) -> tuple[list[Document], list[Any], int]:
    """Return documents of these kinds of text, the rows made of them, and the vocabulary."""
    domains = [domain for domain in load_domains(cache, per_kind) if domain.name in names]
    rows_RT = torch.cat([domain.measured_RT for domain in domains])
    print(f"running the teacher over {rows_RT.numel()} tokens", flush=True)
    seen = see(cache / MODEL, rows_RT, cache)
    documents = documents_of(rows_RT.numpy())
    vocab_size = seen.head.weight_VD.shape[0]
    shard = pa.Table.from_batches([DOCUMENTS.bind(vocab_size=vocab_size).to_batch(documents)])
    print("scoring", flush=True)
    return documents, list(score_shard(STAGE, CachedEngine(seen), shard)), vocab_size


def documents_of(rows_RT: Any) -> list[Document]:
    """Return rows of ids as documents."""
    return [
        Document(sample_id=sample_id_of(ids_T), split="train", input_ids_T=ids_T)
        for ids_T in rows_RT
    ]


def measure(
    documents: Sequence[Document], rows: Sequence[Any], vocab_size: int, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Return rows of both layouts and of their columns, and how many record batches differ."""
    bound = DOCUMENTS.bind(vocab_size=vocab_size)
    document_bytes = write_table(folder / "documents", bound, documents)
    num_tokens = sum(len(document.input_ids_T) for document in documents)
    pa.set_cpu_count(1)
    layouts, read = [], []
    for layout in ("plain", "packed"):
        bound = STAGE.table.bind(vocab_size=vocab_size, packed=layout == "packed")
        started = time.process_time()
        size = write_table(folder / layout, bound, iter(rows))
        write_s = time.process_time() - started
        file = folder / layout / f"{shard_name(0, 1)}.arrow"
        batches, open_s, batch_s = timed(file)
        read.append(batches)
        layouts.append(
            {
                "layout": layout,
                "bytes / token": document_bytes + size,
                "of them priors": prior_bytes(file) / num_tokens,
                "tokens / s read": num_tokens / len(batches) / batch_s,
                "ms a record batch": 1e3 * batch_s,
                "ms to open and read the first": 1e3 * open_s,
                "us / token to write": 1e6 * write_s / num_tokens,
            }
        )
    differ = sum(not same_bits(*pair) for pair in zip(*read, strict=True))
    return layouts, column_bytes(read[0], num_tokens), differ


def timed(file: Path) -> tuple[list[pa.RecordBatch], float, float]:
    """Return all record batches, and the seconds to open a shard and to read one of them.

    Each is the best of some, as other programs take caches away.
    """
    opening = []
    for _ in range(REPEATS):
        started = time.process_time()
        opened = open_batches(pa.memory_map(str(file)))
        opened.get_batch(0)
        opening.append(time.process_time() - started)
    places = range(opened.num_record_batches)
    batches = [opened.get_batch(at) for at in places]  # makes the models of all symbols
    best = [float("inf")] * len(batches)
    for at in [*places] * REPEATS:
        started = time.process_time()
        opened.get_batch(at)
        best[at] = min(best[at], time.process_time() - started)
    return batches, min(opening), sum(best) / len(best)


def prior_bytes(file: Path) -> int:
    """Return what a shard's priors take; those of a plain one nothing."""
    stored = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)
    return len(stored.column("priors")[0].as_py()) if "priors" in stored.schema.names else 0


def same_bits(one: pa.RecordBatch, other: pa.RecordBatch) -> bool:
    """Whether two record batches have equal columns, floats by their bits."""
    return one.schema.equals(other.schema) and all(
        _bits(left) == _bits(right) for left, right in zip(one.columns, other.columns, strict=True)
    )


def _bits(column: pa.Array) -> list[Any]:
    if not pa.types.is_list(column.type):
        return list(column.to_pylist())
    return [column.offsets.to_pylist(), column.values.to_numpy(zero_copy_only=False).tobytes()]


class Costs(Counter):
    """Adds up the bits of each column's symbols under priors."""

    def __init__(self, priors: Priors) -> None:
        """Begin at 0."""
        self.bits: dict[str, float] = {}
        self._priors, self._last = priors, ""

    def coded(self, name: str, contexts_N: Any, symbols_N: Any) -> Any:
        """Add the bits of symbols in their contexts."""
        weights_CX = LEVELS[self._priors.levels[name]]
        of_context_N = weights_CX.sum(axis=1)[contexts_N]
        self._last = name
        self._add(np.log2(of_context_N / weights_CX[contexts_N, symbols_N]))
        return symbols_N

    def alike(self, name: str, count: int, symbols_N: Any) -> Any:
        """Add the bits of symbols of one context."""
        return self.coded(name, np.zeros(count, np.int64), symbols_N)

    def even(self, sizes_N: Any, symbols_N: Any) -> Any:
        """Add the bits of even symbols to the column before."""
        self._add(np.log2(sizes_N))
        return symbols_N

    def _add(self, bits_N: Any) -> None:
        self.bits[self._last] = self.bits.get(self._last, 0.0) + float(bits_N.sum())


def column_bytes(batches: Sequence[pa.RecordBatch], num_tokens: int) -> list[dict[str, Any]]:
    """Return bytes a token of what a row holds, in both layouts."""
    flat, unused, priors = counted(batches)
    costs = Costs(priors)
    for columns in flat:
        walk(costs, len(columns["num_head_P"]), unused, columns, priors.order)
    codec = pa.Codec("zstd", compression_level=CAPTURE_ZSTD_LEVEL)
    rows = []
    for name, (plain, streams) in COLUMNS.items():
        buffers = [
            batch.column(column).values.to_numpy(zero_copy_only=False).tobytes()
            for column in plain
            for batch in batches
        ]
        size = sum(len(codec.compress(buffer)) for buffer in buffers)
        bits = sum(v for k, v in costs.bits.items() if k.startswith(streams))
        rows.append({"column": name, "plain": size / num_tokens, "packed": bits / 8 / num_tokens})
    return rows


def judge(layouts: Sequence[dict[str, Any]], num_different: int) -> list[Bar]:
    """Return the bars."""
    plain, packed = layouts
    size, speed = packed["bytes / token"], packed["tokens / s read"]
    return [
        at_most("packed: bytes a token on disk, everything counted", size, MAX_BYTES),
        at_most("packed: bytes over those of plain", size / plain["bytes / token"], MAX_RATIO),
        at_least("packed: tokens a second read on one core", speed, MIN_TOKENS_PER_S),
        at_most("packed: record batches that differ from plain's", num_different, 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
