"""Run every benchmark, one after another, and print all bars together.

A benchmark is a file below this folder with a ``main`` guard and a ``--json`` option, known by its
bare name. Each writes
``OUTPUT/NAME.json``; options given here that are not listed (``--quick``, ``--cache``) go to each.
One that takes ``--device`` is tried out on the CPU where there is no GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    default = Path(os.environ.get("TEACHERCACHE_CACHE", "~/.cache/teachercache")).expanduser()
    parser = argparse.ArgumentParser(description="Run all benchmarks; 1 if a bar or one failed.")
    parser.add_argument("--output", type=Path, default=default / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, help="for those that write a page: write it there")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as storage training")
    options, passed = parser.parse_known_args(arguments)
    scripts = benchmark_scripts()
    if unknown := [name for name in options.only or () if name not in scripts]:
        parser.error(f"no benchmark '{unknown[0]}'; there are: {', '.join(scripts)}")
    output: Path = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    tried_out = [] if shutil.which("nvidia-smi") else ["--device", "cpu", "--quick"]
    for name in options.only or scripts:
        source = scripts[name].read_text(encoding="utf-8")
        has_page = '"--docs"' in source
        docs = ["--docs", str(options.docs.absolute())] if options.docs and has_page else []
        device = tried_out if '"--device"' in source else []
        outcomes[name] = run(scripts[name], output / f"{name}.json", [*passed, *docs, *device])
    print("\n== all bars ==")
    for name, outcome in outcomes.items():
        print(f"{name}: exit code {outcome['exit_code']}, {outcome['seconds']:.0f} s")
        for bar in outcome["bars"]:
            verdict = "ok  " if bar["ok"] else "FAIL"
            print(f"  {verdict} {bar['name']}: {bar['value']} (bar {bar['target']})")
    print(f"results: {output}")
    return 1 if any(outcome["exit_code"] for outcome in outcomes.values()) else 0


def benchmark_scripts() -> dict[str, Path]:
    """Return the scripts below this one's folder by name, workers and helpers left out."""
    found = sorted(FOLDER.glob("*/*.py"), key=lambda path: path.stem)
    return {path.stem: path for path in found if _is_benchmark(path.read_text(encoding="utf-8"))}


def _is_benchmark(source: str) -> bool:
    takes_json = "benchmark_parser(" in source or '"--json"' in source
    return takes_json and "__main__" in source


def run(benchmark: Path, json_path: Path, passed: Sequence[str]) -> dict[str, Any]:
    """Run one benchmark; its output goes to the console as it comes."""
    print(f"\n== {benchmark.stem} {' '.join(passed)} ==", flush=True)
    json_path.unlink(missing_ok=True)  # an old result must not stand in for a failed run
    script = [sys.executable, str(benchmark), "--json", str(json_path), *passed]
    clock = time.monotonic()
    done = subprocess.run(script, cwd=FOLDER.parent, check=False)
    bars = json.loads(json_path.read_text())["bars"] if json_path.is_file() else []
    return {
        "exit_code": done.returncode,
        "seconds": time.monotonic() - clock,
        "bars": bars,
    }


if __name__ == "__main__":
    sys.exit(main())
