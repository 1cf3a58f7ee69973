"""Does ingest's memory stay put when the input grows tenfold, to 2 GB?

Writes a jsonl of documents made of phrases of the demo texts, ingests it in a process of its own
and reports that process's peak resident memory, as the kernel counts it (``ru_maxrss``), for the
input and for one ten times smaller. A first row, for 2 MB, shows what the libraries and
the tokenizer take by themselves.

What the input is, honestly: by size one fifth of it are distinct documents, seven tenths are
duplicates of documents anywhere before them (every other one with changed spacing), one tenth are
too short to keep. All of it is read, decoded, hashed and sorted, and nine tenths go through the
spool on disk; only the distinct fifth is tokenised, because at 1.5 MB a CPU second the tokenizer
would need over twenty CPU minutes for 2 GB. ``--distinct 1.0`` does that.

``--quick`` takes 100 MB and 10 MB, with segments of 4 MiB in place of 32 MiB: a 10 MB input would
not fill one, and comparing it would show nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PHRASE_WORDS = 12
MAX_RATIO = 1.25
BUDGET_MB = 1000
MIN_CHARS = 200
LIBRARIES_ONLY = 2_000_000  # bytes of input that hardly count

INGEST = """
import sys
from pathlib import Path
from stages.sources.documents.stage import IngestStage
stage = IngestStage.model_validate_json(sys.argv[1])
prepared = stage.work.prepare(stage, Path(sys.argv[2]), segment_bytes=int(sys.argv[3]))
rows = sum(shard.rows for shard in prepared.shards)
print(prepared.documents_read, rows, prepared.rejects)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    cache: Path = options.cache.expanduser()
    for needed in ("text/c4_demo.jsonl", "text/wiki_demo.txt", "models/smollm2-135m-instruct"):
        if not (cache / needed).exists():
            print(f"{cache / needed} is missing: run `python examples/fetch_assets.py` first")
            return 2
    large = 100_000_000 if options.quick else 2_000_000_000
    segment_bytes = 4 << 20 if options.quick else 32 << 20
    words = demo_words(cache / "text")
    rows = []
    for size in (LIBRARIES_ONLY, large // 10, large):
        with tempfile.TemporaryDirectory(prefix="ingest-memory-", dir=options.work) as folder:
            source = Path(folder) / "input.jsonl"
            write_input(source, size, words, options.distinct)
            rows.append(measure(source, cache / "models/smollm2-135m-instruct", segment_bytes))
        print(json.dumps(rows[-1]), flush=True)
    bars = [
        bar("peak memory over that of a 10x smaller input", peak_ratio(rows), MAX_RATIO),
        bar("peak memory of the larger input, MB", rows[-1]["peak_mb"], BUDGET_MB),
    ]
    for entry in bars:
        print(f"{'ok  ' if entry['ok'] else 'FAIL'} {entry['name']}: {entry['value']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"bars": bars, "rows": rows}, indent=1) + "\n")
    return 0 if all(entry["ok"] for entry in bars) else 1


def _parser() -> argparse.ArgumentParser:
    default = os.environ.get("TEACHERCACHE_CACHE", "~/.cache/teachercache")
    parser = argparse.ArgumentParser(description="Peak memory of ingest against input size.")
    parser.add_argument("--quick", action="store_true", help="100 MB instead of 2 GB")
    parser.add_argument("--json", type=Path, help="write bars and rows to this file")
    parser.add_argument("--cache", type=Path, default=Path(default), help=f"default: {default}")
    parser.add_argument("--work", type=Path, help="where the input is written for a while")
    parser.add_argument("--distinct", type=float, default=0.2, help="share of distinct documents")
    return parser


def demo_words(folder: Path) -> list[str]:
    """Return the words of the demo texts, in order."""
    with (folder / "c4_demo.jsonl").open(encoding="utf-8") as lines:
        web = [json.loads(line)["text"] for line in lines]
    wiki = (folder / "wiki_demo.txt").read_text(encoding="utf-8")
    return " ".join([*web, wiki]).split()


def document(number: int, words: Sequence[str]) -> str:
    """Return document ``number``: 5 to 80 phrases (0.3 to 6 kB), the same on every machine."""
    rng = np.random.default_rng(number)
    starts = rng.integers(0, len(words) - PHRASE_WORDS, rng.integers(5, 80)).tolist()
    phrases = [" ".join(words[start : start + PHRASE_WORDS]) for start in starts]
    return f"{number}. " + " ".join(phrases)


def write_input(path: Path, size: int, words: Sequence[str], distinct: float) -> None:
    """Write about ``size`` bytes of jsonl with the stated shares, mixed throughout."""
    rng = np.random.default_rng(0)
    written, made = 0, 0
    shares = np.array([distinct, (1 - distinct) * 7 / 8, (1 - distinct) / 8])
    goal = np.zeros(3)
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            behind = np.where(shares > 0, goal / np.maximum(shares, 1e-9), np.inf)
            kind = int(np.argmin(behind))
            if kind == 0:
                text, made = document(made, words), made + 1
            elif kind == 1:
                number = int(rng.integers(made))
                text = document(number, words)
                text = text.replace(". ", ".\n ", 1) if number % 2 else text
            else:
                text = document(made, words)[: MIN_CHARS // 2]
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            stream.write(line)
            goal[kind] += len(line)
            written += len(line.encode())


def measure(source: Path, tokenizer: Path, segment_bytes: int) -> dict[str, Any]:
    """Ingest ``source`` in a child process; return its peak memory and what it did."""
    stage = {
        "stage": "ingest",
        "source": {"kind": "jsonl", "paths": [str(source)]},
        "tokenizer": str(tokenizer.absolute()),
        "length": 512,
        "mode": "pack",
        "heldout_fraction": 0.01,
        "min_chars": MIN_CHARS,
    }
    work = source.parent / "work"
    command = [sys.executable, "-c", INGEST, json.dumps(stage), str(work), str(segment_bytes)]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_root()) as child:
        assert child.stdout is not None
        printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"ingest failed with exit code {child.returncode}")
    seconds = time.monotonic() - started
    documents, rows, rejects = printed.strip().split(" ", 2)
    return {
        "input_mb": round(source.stat().st_size / 1e6, 1),
        "segment_mib": segment_bytes >> 20,
        "peak_mb": round(usage.ru_maxrss * 1024 / 1e6, 1),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "documents_read": int(documents),
        "rows_of_512": int(rows),
        "rejects": rejects,
    }


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def peak_ratio(rows: Sequence[dict[str, Any]]) -> float:
    return round(float(rows[-1]["peak_mb"] / rows[-2]["peak_mb"]), 3)


def bar(name: str, value: float, at_most: float) -> dict[str, Any]:
    return {"name": name, "value": value, "target": at_most, "ok": value <= at_most}


if __name__ == "__main__":
    sys.exit(main())
