"""Peak memory of a process that captures a table, vLLM beside transformers, on a CPU.

Each engine captures the same rows of real web text in a process of its own, from its first import
to a written shard; the peak is the kernel's (``VmHWM``). Two models: SmolLM2-135M, and one that is
mostly vocabulary (151,936 tokens of width 896, two layers, random weights in a bfloat16 file),
where one more copy of the embeddings shows.

Bar: vLLM's peak is at most 1.5 times that of transformers, for each model.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.bars import Bar, at_most, bars_table, benchmark_parser, finish, markdown_table
from benchmarks.capture.capture_workers import ENVIRONMENT, OURS, Task, capture_ways, memory_mb
from benchmarks.storage.real_positions import MODEL, load_domain, missing_asset
from stages.models.engines.engine import EngineKind, open_engine
from stages.models.spec import EngineOptions

MOST = 1.5
ENGINES: tuple[EngineKind, ...] = ("transformers", "vllm")
SMOL, WIDE = "SmolLM2-135M", "large vocabulary"
K = 16
# rows of 512 tokens: an engine's batch takes eight
FULL = {SMOL: 24, WIDE: 8}
QUICK = {SMOL: 8}

Row = dict[str, Any]

TEXT = """# Memory of one engine

Regenerate with `python benchmarks/capture/capture_memory.py --docs docs/measured/` (the table and
the bars come from that run).

A `teacher_logits` table is captured in float32 on a CPU, by each engine in a process of its own,
from rows of 512 tokens of web text ({counts}). The second model is two layers of random weights
and 151,936 tokens of width 896, in a bfloat16 file. *Libraries* is what is resident before a model
is loaded, *started* when the first row can be scored, *peak* the most there ever was, in MB.

{rows}

{bars}

## What vLLM takes beside transformers

On SmolLM2-135M (538 MB of weights, 24 rows, November 2026):

- **Libraries**: 320 MB more, most of them imported while the engine starts.
- **Keys and values**: 2 GiB are set aside (`execution.engine.kv_cache_memory_bytes` says another
  amount), and memory is taken as they are written. Without a prefix cache vLLM gives out the blocks
  that came back last, so a table holds those of one batch (`max_num_batched_tokens`, 4,096) and of
  the longest row: 189 MB here (32 blocks of 128 tokens, 46,080 bytes a token). Tables that share
  prefixes (those of pairs, candidates and subsets) fill all of it in time. A cluster's machines
  are asked for all of it.
- **Weights** are held once, in the form that oneDNN multiplies with. Of the embeddings vLLM keeps
  such a copy too, which nothing of ours reads: it is freed at the start (113 MB here, 545 MB with
  151,936 tokens of width 896). The matrices in their first form are freed, and their pages given
  back (250 MB).
- **The head** is ours with either engine. In float32 of a float32 file it is the file's pages; else
  a copy (113 MB here).
- **The start** reads a file through its pages, which count as resident until it is read, beside the
  weights that they are copied to; transformers keeps the pages of a float32 file as its weights.
  vLLM holds one more copy of the embeddings until then. With a float32 file of the second model
  that is the peak, 2,718 MB against 1,780; the system can drop such pages at any time.

With the cache written at once, two copies of the embeddings and freed pages kept, the peak was
4,177 MB, 2.9 times that of transformers. The batches are the same, and so are the bytes of the
table.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write capture_memory.md there")
    options = parser.parse_args(arguments)
    if missing := missing_asset(options.cache):
        print(missing)
        return 2
    counts = QUICK if options.quick else FULL
    rows_RT = load_domain(options.cache, "web", max(counts.values())).measured_RT.numpy()
    engine = EngineOptions(device="cpu", cache_dir=options.cache / "benchmarks" / "head_check")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="capture-memory-") as folder:
        models = {SMOL: options.cache / MODEL, WIDE: Path(folder) / "wide"}
        if WIDE in counts:
            save_wide_model(models[WIDE], models[SMOL])
        for name, count in counts.items():
            task = Task(models[name], rows_RT[:count], engine, Path(folder), K)
            rows += [{"model": name, "engine": kind} | measured(kind, task) for kind in ENGINES]
    bars = judge(rows)
    if options.docs:
        text = TEXT.format(
            counts=", ".join(f"{name}: {count}" for name, count in counts.items()),
            rows=markdown_table(rows),
            bars=bars_table(bars),
        )
        options.docs.mkdir(parents=True, exist_ok=True)
        (options.docs / "capture_memory.md").write_text(text, encoding="utf-8")
    return finish(bars, rows, options.json)


def save_wide_model(folder: Path, tokenizer: Path) -> None:
    """Write a model of random weights: in float32 545 of its 664 MB are embeddings."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*.json"):  # vLLM does not start without one
        shutil.copy(file, folder)


def measured(kind: EngineKind, task: Task) -> Row:
    """Return what a process of its own says of its memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        return alone.submit(_capture, kind, task).result()


def _capture(kind: EngineKind, task: Task) -> Row:
    os.environ.update(ENVIRONMENT)
    if kind == "vllm":
        import vllm  # noqa: F401
    libraries = memory_mb("VmRSS")
    with open_engine(kind, task.model, dtype="float32", options=task.options) as engine:
        started = memory_mb("VmRSS")
        way, clock = capture_ways(engine, task, None)[OURS], time.perf_counter()
        way()
        rate = task.prompts_RT.size / (time.perf_counter() - clock)
    return {
        "libraries": round(libraries),
        "started": round(started),
        "peak": round(memory_mb("VmHWM")),
        "tokens/s": round(rate, 1),
    }


def judge(rows: Sequence[Row]) -> list[Bar]:
    """Return a bar for each model."""
    peaks = {(row["model"], row["engine"]): row["peak"] for row in rows}
    return [
        at_most(
            f"{model}: peak memory, vLLM over transformers",
            peaks[model, "vllm"] / peaks[model, "transformers"],
            MOST,
        )
        for model, engine in peaks
        if engine == "vllm"
    ]


if __name__ == "__main__":
    sys.exit(main())
