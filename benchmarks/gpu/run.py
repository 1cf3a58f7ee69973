"""One GPU, one command, nine minutes: the encoding, the losses and a training step, each checked.

``python benchmarks/gpu/run.py`` needs torch, transformers and one NVIDIA GPU of 80 GB, and no vLLM.
Its parts run one after another, each in a process of its own, so that memory is given back and a
kernel that breaks takes no other part with it. Each result is compared with float64 before it is
timed. What there is no time for is skipped and named; so is what fails, in one line.

Liger and VeOmni are measured beside ours where they are installed.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import benchmark_parser, finish
from benchmarks.gpu.page import page

PARTS = ("encoding", "losses", "sparse_targets", "training_step")
SECONDS, QUICK_SECONDS = 520.0, 120.0
SHOWN = ("part", "what", "positions", "ms", "GB", "reads", "tokens/s", "times")
ROOT = Path(__file__).resolve().parents[2]
Found = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--seconds", type=float, help=f"for all parts; default: {SECONDS:.0f}")
    parser.add_argument("--docs", type=Path, help="write gpu.md to this folder")
    parser.add_argument("--only-part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu tries the script out: give --quick, too")
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    if options.only_part:
        return run_part(options.only_part, options, seconds)
    began = time.monotonic()
    found = [_in_a_process(part, options, began + seconds) for part in options.parts]
    result = together(found)
    shown = [{name: row.get(name) for name in SHOWN} for row in result["rows"]]
    status = finish(result["bars"], result["rows"], None, shown=shown)
    for note in result["notes"]:
        print(note)
    print(f"{json.dumps(result['card'])}, {time.monotonic() - began:.0f} s")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.docs and options.device == "cpu":
        print("no page is written: times on a CPU mean nothing there")
    elif options.docs:
        options.docs.mkdir(parents=True, exist_ok=True)
        (options.docs / "gpu.md").write_text(page(result), encoding="utf-8")
    return 1 if result["wrong"] else status


def run_part(part: str, options: argparse.Namespace, seconds: float) -> int:
    """Run one part in this process; its findings go to ``--json`` as they come."""
    deadline = time.monotonic() + seconds
    from benchmarks.gpu.card import open_card  # loads torch, which the command itself has no use of
    from benchmarks.gpu.report import Report

    report = Report(part.replace("_", " "), open_card(options.device), deadline, options.json)
    work = importlib.import_module(f"benchmarks.gpu.{part}")
    report.attempt("all of it", lambda: work.run(report, quick=options.quick))
    return 0


def _in_a_process(part: str, options: argparse.Namespace, deadline: float) -> Found:
    """Run a part in a process of its own; what it cannot say itself is said for it."""
    left = deadline - time.monotonic()
    name = part.replace("_", " ")
    nothing: Found = {"rows": [], "bars": [], "notes": [], "wrong": 0, "card": {}}
    if left <= 0:
        return nothing | {"notes": [f"{name}: skipped, the time is over"]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = [
            sys.executable,
            "-m",
            "benchmarks.gpu.run",
            "--only-part",
            part,
            "--json",
            str(file),
        ]
        words += ["--device", options.device, "--seconds", f"{left:.0f}"]
        words += ["--quick"] if options.quick else []
        trouble = ""
        try:
            code = subprocess.run(words, cwd=ROOT, check=False, timeout=left + 10).returncode
            if code != 0:
                trouble = f"{name}: ended with exit code {code}; what it had found is kept"
        except subprocess.TimeoutExpired:
            trouble = f"{name}: stopped, the time is over; what it had found is kept"
        found: Found = json.loads(file.read_text()) if file.is_file() else nothing
    if trouble:
        found = found | {"notes": [*found["notes"], trouble], "wrong": found["wrong"] + 1}
    return found


def together(found: Sequence[Found]) -> Found:
    """Return the findings of all parts as one."""
    return {
        "card": next((each["card"] for each in found if each["card"]), {}),
        "rows": [row for each in found for row in each["rows"]],
        "bars": [bar for each in found for bar in each["bars"]],
        "notes": [note for each in found for note in each["notes"]],
        "wrong": sum(each["wrong"] for each in found),
    }


if __name__ == "__main__":
    sys.exit(main())
