"""How much faster are token files than text, and what do two Ray workers make of them?

Documents are read as text by ``ingest`` and as ids by ``token_files``, packed to the same length,
each in a process of its own that may use one core: tokens a second of processor time, from the plan
to the manifest, without the start and the imports. The files of ids hold each document many times,
every time turned by another number of tokens, so that every way works for about as long and what a
run costs whatever its size weighs the same. A repetition runs all ways in turns and what is judged
is the median ratio within one. Files are hashed for their names before, as ``plan`` does once.

Two Ray workers share larger shards. Other work shares the machine's two cores, so three figures
stand beside each other: shards a second of two over twice those of one, the same of bare processes
that burn processor time without an executor, at the same time; and the share of the time that
workers had a shard in hand, which other work cannot move.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from benchmarks.bars import Bar, at_least, bars_table, benchmark_parser, finish, markdown_table
from benchmarks.ingest.ingest_memory import demo_words, document
from benchmarks.scaling.scaling import bare_rate, rounds_of

Ids = npt.NDArray[np.uint16]
FORMATS = {"parquet": "a.parquet", "megatron": "a.idx", "datatrove": "a.ds"}
LENGTH = 512
MIN_SPEED_UP, MIN_EFFICIENCY = 20.0, 0.9
# documents, copies in the files of ids, repetitions, shards for two workers, rows of each
FULL, QUICK = (4000, 24, 3, 14, 10_000), (1000, 24, 1, 10, 4000)
ROW_TOKENS = 2048
ONE_CORE = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "POLARS_MAX_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}

PAGE = """# Token files: the speed of reading ids, beside that of text

Written by `python benchmarks/ingest/token_files.py --docs docs/measured/`. {documents:,}
documents, {tokens:,} tokens of SmolLM2's tokenizer, packed to rows of {length}; the files of ids
hold each {copies} times, turned by another number of tokens, so that every way works for about as
long. Each in a process of its own on one core, tokens a second of *processor time* from plan to
manifest, median of {repetitions} repetitions in turns. 2 CPU cores, shared with other work.

{bars}

{speeds}

Two workers: {shards} shards of {shard_tokens:,} tokens (Megatron). "efficiency" is shards a second
of two workers over twice those of one; of "bare", two processes that burn processor time without an
executor, run beside them: what the machine had to give. "in hand" is the share of the workers' time
in the middle of the run in which they had a shard in hand, which other work moves little.

{scaling}
"""

RUN = """
import json, sys, time
import pyarrow, datasets, polars, transformers
import stages.sources.documents.work, stages.sources.token_files.work
from transformers import AutoTokenizer
from pathlib import Path
from pipeline.planning.plan import make_plan
from pipeline.planning.recipe_file import load_recipe
from pipeline.reports.progress import ConsoleReporter
from pipeline.steps.run import run_plan
from rich.console import Console
from schemas.storage.manifest import read_manifest
pyarrow.set_cpu_count(1)
recipe = load_recipe(Path(sys.argv[1]), sys.argv[2:])
make_plan(recipe)
clock = time.process_time()
plan = make_plan(recipe)
run_plan(plan, recipe.execution, ConsoleReporter(Console(stderr=True)))
seconds = time.process_time() - clock
print(json.dumps([read_manifest(plan[0].place).num_tokens, seconds, str(plan[0].place)]))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write token_files.md to this folder")
    options = parser.parse_args(arguments)
    documents, copies, repetitions, num_shards, shard_rows = QUICK if options.quick else FULL
    model = options.cache / "models" / "smollm2-135m-instruct"
    if not model.is_dir():
        print(f"{model} is missing: run `python examples/fetch_assets.py` first")
        return 2
    with tempfile.TemporaryDirectory(prefix="token-files-") as name:
        folder = Path(name)
        ids = write_text(folder, options.cache / "text", model, documents)
        write_token_files(folder, [np.roll(row, turn) for turn in range(copies) for row in ids])
        speeds = compare_speeds(folder, model, repetitions)
        write_megatron(folder / "large", large_rows(ids, num_shards * shard_rows))
        scaling = compare_workers(folder, model, shard_rows, num_shards, repetitions)
    bars = judge(speeds, scaling)
    status = finish(bars, [*speeds, *scaling], options.json)
    if options.docs:
        page = PAGE.format(
            documents=documents,
            tokens=sum(map(len, ids)),
            copies=copies,
            length=LENGTH,
            repetitions=repetitions,
            shards=num_shards,
            shard_tokens=shard_rows * ROW_TOKENS,
            bars=bars_table(bars),
            speeds=markdown_table(speeds),
            scaling=markdown_table(scaling),
        )
        (options.docs / "token_files.md").write_text(page, encoding="utf-8")
    return status


def write_text(folder: Path, text: Path, model: Path, documents: int) -> list[Ids]:
    """Write documents as text; return their ids."""
    words = demo_words(text)
    texts = [document(number, words) for number in range(documents)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(found.ids, np.uint16) for found in encoded]


def write_token_files(folder: Path, ids: Sequence[Ids]) -> None:
    """Write ids in each format."""
    pq.write_table(
        pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))}), folder / "a.parquet"
    )
    write_megatron(folder / "a", ids)
    (folder / "a.ds").write_bytes(np.concatenate(ids).tobytes())
    ends = np.cumsum([len(row) for row in ids]).astype("<u8")
    (folder / "a.ds.index").write_bytes(ends.tobytes())


def write_megatron(path: Path, rows: Sequence[Ids]) -> None:
    """Write ``.bin`` and ``.idx`` of 16-bit ids."""
    lengths = np.array([len(row) for row in rows], "<i4")
    starts = (2 * (np.cumsum(lengths, dtype=np.int64) - lengths)).astype("<i8")
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(rows), len(rows) + 1)
    marks = np.arange(len(rows) + 1, dtype="<i8")
    path.with_suffix(".bin").write_bytes(np.concatenate(rows).tobytes())
    path.with_suffix(".idx").write_bytes(
        b"".join([head, lengths.tobytes(), starts.tobytes(), marks.tobytes()])
    )


def large_rows(ids: Sequence[Ids], num_rows: int) -> list[Ids]:
    """Return rows of ``ROW_TOKENS`` from anywhere in the documents, none of them twice."""
    stream = np.concatenate(ids)
    every = len(stream) - ROW_TOKENS
    starts = np.random.default_rng(0).choice(every, num_rows, replace=False)
    return [stream[start : start + ROW_TOKENS] for start in starts]


def recipe_of(folder: Path, model: Path, name: str, step: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    common = {"tokenizer": "teacher", "length": LENGTH, "mode": "pack", "heldout_fraction": 0.0}
    body = {
        "name": name,
        "models": {"teacher": {"path": str(model)}},
        "steps": {"rows": common | step},
        "execution": {"root": str(folder / "root")},
    }
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


def measure(recipe: Path, *settings: str) -> tuple[int, float, Path]:
    """Run a recipe in a process of one core; return tokens, CPU seconds and the step's folder."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(recipe), *settings],
        env={**os.environ, **ONE_CORE},
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    tokens, seconds, place = json.loads(done.stdout.splitlines()[-1])
    return tokens, seconds, Path(place)


def compare_speeds(folder: Path, model: Path, repetitions: int) -> list[dict[str, Any]]:
    text = {"stage": "ingest", "source": {"kind": "jsonl", "paths": [str(folder / "text.jsonl")]}}
    ways = {"text": recipe_of(folder, model, "text", text)}
    for kind, name in FORMATS.items():
        source = {"kind": kind, "paths": [str(folder / name)]}
        ways[kind] = recipe_of(folder, model, kind, {"stage": "token_files", "source": source})
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repetitions):
        for way, recipe in ways.items():
            tokens, seconds, place = measure(recipe)
            found[way].append(tokens / seconds)
            shutil.rmtree(place)
    rows = []
    for way, rates in found.items():
        ratios = [rate / text for rate, text in zip(rates, found["text"], strict=True)]
        row = {"way": way, "tokens/s": median(rates), "times text": median(ratios)}
        rows.append(row | {"least": min(ratios), "most": max(ratios)})
    return rows


def compare_workers(
    folder: Path, model: Path, shard_rows: int, num_shards: int, repetitions: int
) -> list[dict[str, Any]]:
    source = {"kind": "megatron", "paths": [str(folder / "large.idx")]}
    step = {"stage": "token_files", "source": source, "rows_per_shard": shard_rows}
    recipe = recipe_of(folder, model, "large", step | {"mode": "as_given", "length": ROW_TOKENS})
    found: dict[str, list[tuple[float, float, float]]] = {"local": [], "ray": [], "bare": []}
    for _ in range(repetitions):
        for executor in ("local", "ray"):
            rates, shares = [], []
            for workers in (1, 2):
                where = (f"execution.executor={executor}", f"execution.workers={workers}")
                _, _, place = measure(recipe, *where)
                rate, share = from_records(place, workers)
                rates.append(rate)
                shares.append(share)
                shutil.rmtree(place)
            found[executor].append((rates[0], rates[1], shares[1]))
        rounds = rounds_of(1 / rates[0])  # as long as a shard took
        one, two = (bare_rate(workers, num_shards, rounds) for workers in (1, 2))
        found["bare"].append((one, two, 1.0))
    rows = []
    for way, runs in found.items():
        ratios = [two / one / 2 for one, two, _ in runs]
        one, two, share = (median(column) for column in zip(*runs, strict=True))
        row = {"way": way, "shards/s, 1 worker": one, "shards/s, 2 workers": two}
        rows.append(row | {"efficiency": median(ratios), "in hand": share})
    return rows


def from_records(place: Path, workers: int) -> tuple[float, float]:
    """Return shards a second and the share of time in hand, by the middle of a run's records."""
    notes = [json.loads(path.read_text())["notes"] for path in place.glob("shard-*.json")]
    spans = [(note["started_at_s"], note["started_at_s"] + note["seconds"]) for note in notes]
    ends = sorted(end for _, end in spans)[2 * workers - 1 : len(spans) - workers]
    first, last = ends[0], ends[-1]
    in_hand = sum(max(0.0, min(end, last) - max(start, first)) for start, end in spans)
    return (len(ends) - 1) / (last - first), in_hand / (last - first) / workers


def judge(speeds: Sequence[dict[str, Any]], scaling: Sequence[dict[str, Any]]) -> list[Bar]:
    by_way = {row["way"]: row for row in (*speeds, *scaling)}
    bars = [
        at_least(f"{kind}: times the tokens/s of text", by_way[kind]["times text"], MIN_SPEED_UP)
        for kind in FORMATS
    ]
    of_bare = by_way["ray"]["efficiency"] / by_way["bare"]["efficiency"]
    return [
        *bars,
        at_least("Ray, two workers: efficiency, of bare processes'", of_bare, MIN_EFFICIENCY),
        at_least("Ray, two workers: a shard in hand", by_way["ray"]["in hand"], MIN_EFFICIENCY),
    ]


if __name__ == "__main__":
    sys.exit(main())
