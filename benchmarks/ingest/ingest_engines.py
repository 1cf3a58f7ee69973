"""Ray Data or polars for ingest: the same shuffle of the same text by content, on one machine.

What ingest asks of an engine is to bring equal texts together: read jsonl, give each text a key (a
hash), drop duplicates, put the rest in the order of keys, write it. Everything before and after is
our own code, whichever engine does this. Each engine runs in a process of its own, twice on
all cores and once on one; times and memory are of the whole tree of processes.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bars import at_least, at_most, benchmark_parser, finish
from benchmarks.ingest.ingest_memory import demo_words, write_input

POLARS = """
import hashlib, sys
import polars as pl
def key(texts):
    return pl.Series([hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts])
rows = pl.scan_ndjson(sys.argv[1], schema={"text": pl.String})
rows = rows.with_columns(key=pl.col("text").map_batches(key, return_dtype=pl.Binary))
rows = rows.unique("key", keep="any").sort("key")
rows.sink_parquet(sys.argv[2] + "/rows.parquet", engine="streaming")
"""

RAY = """
import hashlib, logging, os, sys
import pyarrow as pa
import ray
def add_key(batch):
    keys = [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in batch["text"].to_pylist()]
    return batch.append_column("key", pa.array(keys, pa.binary()))
def distinct(batch):
    batch = batch.sort_by("key")
    keys = batch["key"].to_pylist()
    return batch.filter(pa.array([i == 0 or keys[i] != keys[i - 1] for i in range(len(keys))]))
ray.init(address="local", num_cpus=int(sys.argv[3]), include_dashboard=False,
         log_to_driver=False, logging_level=logging.ERROR)
ray.data.DataContext.get_current().enable_progress_bars = False
rows = ray.data.read_json(sys.argv[1]).map_batches(add_key, batch_format="pyarrow")
rows = rows.repartition(16, keys=["key"])
rows = rows.map_batches(distinct, batch_format="pyarrow", batch_size=None)
rows.write_parquet(sys.argv[2])
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = benchmark_parser(__doc__ or "").parse_args(arguments)
    size = 20_000_000 if options.quick else 200_000_000
    cores = os.cpu_count() or 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ingest-engines-") as folder:
        source = Path(folder) / "input.jsonl"
        write_input(source, size, demo_words(options.cache / "text"), distinct=0.5)
        for engine, script in (("polars", POLARS), ("ray data", RAY)):
            for threads in (cores, cores, 1):
                with tempfile.TemporaryDirectory(dir=folder) as output:
                    rows.append(measure(engine, script, source, Path(output), threads))
                print(rows[-1], flush=True)
    ours, theirs = ([row for row in rows if row["engine"] == e] for e in ("polars", "ray data"))
    found = {row["distinct"] for row in rows}
    assert len(found) == 1, f"the engines disagree on what is distinct: {found}"
    bars = [
        at_most("polars: files that three runs differ in", differing(ours), 0),
        at_least("Ray Data's time over polars'", ratio(theirs, ours, "seconds"), 1.0),
        at_least("Ray Data's peak memory over polars'", ratio(theirs, ours, "peak_mb"), 1.0),
    ]
    return finish(bars, rows, options.json)


def measure(engine: str, script: str, source: Path, output: Path, threads: int) -> dict[str, Any]:
    """Run one engine to its end; ``peak_mb`` is the proportional memory of all its processes."""
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(output), str(threads)],
        env={
            **os.environ,
            "POLARS_MAX_THREADS": str(threads),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started, peak, tree = time.monotonic(), 0, psutil.Process(child.pid)
    while child.poll() is None:
        peak = max(peak, memory_of(tree))
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"{engine} ended with exit code {child.returncode}")
    files = sorted(output.rglob("*.parquet"))
    return {
        "engine": engine,
        "threads": threads,
        "seconds": round(time.monotonic() - started, 1),
        "peak_mb": round(peak / 1e6),
        "distinct": rows_in(files),
        "files": len(files),
        "names": ", ".join(path.name for path in files[:1]),
        "content": content_of(files),
    }


def memory_of(tree: psutil.Process) -> int:
    total = 0
    try:
        for process in [tree, *tree.children(recursive=True)]:
            total += process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass
    return total


def rows_in(files: Sequence[Path]) -> int:
    import pyarrow.parquet as pq

    return sum(int(pq.ParquetFile(path).metadata.num_rows) for path in files)


def content_of(files: Sequence[Path]) -> str:
    """Return a name for the files' names and bytes."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def differing(rows: Sequence[dict[str, Any]]) -> int:
    return len({row["content"] for row in rows}) - 1


def ratio(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], name: str) -> float:
    return round(float(min(r[name] for r in rows) / min(r[name] for r in others)), 2)


if __name__ == "__main__":
    sys.exit(main())
