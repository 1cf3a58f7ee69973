"""What does MEND's cache save in training, and what do its vectors save in answering?

Training: steps with the teacher's pass from the cache against the same steps with it live, each
batch twice in one run, one step live and the next cached (``mend_steps``); peak memory is that of
a run of its own. Answering: a query after vectors against one after the demonstrations as text, by
their number (``query_pass``). Every ratio is between neighbours in time, and a median; CPU time
stands beside wall time, as the machine may be shared.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bars import Bar, at_most, benchmark_parser, finish
from benchmarks.mend.mend_report import Shape, write_docs
from benchmarks.mend.mend_steps import StepsJob
from benchmarks.mend.mend_tables import MendSize, MendTables, prepared_mend
from benchmarks.mend.query_pass import KEPT, MAKING, TEXT, VECTORS, QueryJob

ROOT = Path(__file__).resolve().parents[2]
MAX_STEP, MAX_QUERY, AT = 0.6, 0.5, 32
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is run. ``pairs`` are measured after one of warm-up; ``steps`` for the peaks."""

    size: MendSize
    batch_size: int
    pairs: int
    steps: int
    counts: tuple[int, ...]
    rounds: int


FULL = Settings(
    size=MendSize(demonstrations=16, rows=24, layers=6, vectors=100),
    batch_size=4,
    pairs=4,
    steps=2,
    counts=(0, 1, 2, 4, 8, 16, 32, 64),
    rounds=3,
)
QUICK = Settings(
    size=MendSize(demonstrations=4, rows=8, layers=2, vectors=16),
    batch_size=2,
    pairs=2,
    steps=1,
    counts=(0, 8, 32),
    rounds=1,
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write mend.md and its plot to this folder")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    load = os.getloadavg()[0]
    print(f"load average at the start: {load:.1f} on {os.cpu_count()} cores", flush=True)
    tables = prepared_mend(options.cache, settings.size)
    training = training_rows(settings, tables)
    shares = share_rows(settings, tables)
    lengths = tables.lengths()
    answering, check = query_rows(settings, tables, lengths)
    bars = bars_of(training, answering)
    status = finish(bars, [*training, *shares, *answering], options.json)
    if options.docs:
        shape = Shape(
            lengths, settings.batch_size, settings.size.layers, settings.size.vectors, check, load
        )
        write_docs(options.docs, shape, (training, shares, answering), bars)
    return status


def answer_of(script: str, job: str) -> Answer:
    """Run a script of this folder in a process of its own and return its answer."""
    # As in the Makefile: OpenMP threads that spin while idle would be counted as work.
    still = {"KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
    environment = {"OMP_NUM_THREADS": str(os.cpu_count())} | still | dict(os.environ)
    environment |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.json"
        child = [sys.executable, str(ROOT / "benchmarks/mend" / script), job, str(path)]
        done = subprocess.run(
            child, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"{script} {job} failed:\n{done.stderr[-3000:]}")
        answer: Answer = json.loads(path.read_text())
    return answer


def steps_of(variant: str, steps: int, settings: Settings, tables: MendTables) -> Answer:
    """Run one variant of a step."""
    encoding = "threshold" if variant == "cached_threshold" else "exact"
    job = StepsJob(
        variant=variant,
        reader=str(tables.reader),
        distiller=str(tables.distiller),
        asked=str(tables.asked),
        signals=str(tables.signals[encoding]),
        batch_size=settings.batch_size,
        steps=steps,
    )
    answer = answer_of("mend_steps.py", job.as_json())
    print(f"{variant}: {json.dumps(answer)}", flush=True)
    return answer


def training_rows(settings: Settings, tables: MendTables) -> list[dict[str, Any]]:
    """Return a row a variant: seconds a step, ratios within pairs, peaks of runs of their own."""
    both = steps_of("alternated", 2 + 2 * settings.pairs, settings, tables)
    alone = {
        name: steps_of(name, settings.steps, settings, tables)
        for name in ("live", "cached_exact", "cached_threshold")
    }
    rows = []
    for name, answer in alone.items():
        row: dict[str, Any] = {"variant": name}
        if name != "cached_threshold":
            first = 2 if name == "live" else 3
            for clock, label in (("step_s", "s a step"), ("step_cpu_s", "CPU s a step")):
                mine, live = both[clock][first::2], both[clock][2::2]
                row[label] = round(statistics.median(mine), 2)
                row[f"{'CPU' if 'cpu' in clock else 'wall'}, over live"] = ratio(mine, live)
        row["peak MB"] = round(answer["peak_mb"])
        row["memory, over live"] = round(answer["peak_mb"] / alone["live"]["peak_mb"], 3)
        row["first loss"] = round(answer["losses"][0], 4)
        rows.append(row)
    return rows


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of ratios of what was measured side by side."""
    return round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 3)


def share_rows(settings: Settings, tables: MendTables) -> list[dict[str, Any]]:
    """Return each part of a step: CPU seconds, and its share of a cached step."""
    found = steps_of("shares", settings.pairs, settings, tables)["parts_cpu_s"]
    seconds = {name: statistics.median(times) for name, times in found.items()}
    cached = sum(value for name, value in seconds.items() if "live" not in name)
    return [
        {"part": name, "CPU s": round(value, 2), "of a cached step": round(value / cached, 3)}
        for name, value in seconds.items()
    ]


def query_rows(
    settings: Settings, tables: MendTables, lengths: Mapping[str, float]
) -> tuple[list[dict[str, Any]], Mapping[str, int]]:
    """Return a row a number of demonstrations, and the formula's count beside torch's."""
    job = QueryJob(
        reader=str(tables.reader),
        distiller=str(tables.distiller),
        asked=str(tables.asked),
        counts=settings.counts,
        one=lengths["one"],
        query=round(lengths["query"]),
        rounds=settings.rounds,
    )
    found = answer_of("query_pass.py", job.as_json())
    rows = []
    for count in settings.counts:
        row: dict[str, Any] = {"demonstrations": count}
        for name in (TEXT, VECTORS, KEPT, MAKING):
            if count or name != MAKING:
                row[f"{name}, GFLOP"] = round(found["flops"][f"{name}/{count}"] / 1e9, 1)
                row[f"{name}, s"] = round(statistics.median(found["wall"][f"{name}/{count}"]), 3)
        text, vectors = (f"{name}/{count}" for name in (TEXT, VECTORS))
        row["FLOP, vectors over text"] = round(found["flops"][vectors] / found["flops"][text], 3)
        for clock, label in (("wall", "wall"), ("cpu", "CPU")):
            row[f"{label}, vectors over text"] = ratio(found[clock][vectors], found[clock][text])
        rows.append(row)
    return rows, found["check"]


def bars_of(
    training: Sequence[Mapping[str, Any]], answering: Sequence[Mapping[str, Any]]
) -> list[Bar]:
    """Return what is promised: of training steps, and of the query pass."""
    cached = next(row for row in training if row["variant"] == "cached_exact")
    asked = next(row for row in answering if row["demonstrations"] == AT)
    query = f"query after vectors over {AT} demonstrations as text"
    return [
        at_most("step with the cached pass over live, wall", cached["wall, over live"], MAX_STEP),
        at_most("step with the cached pass over live, CPU", cached["CPU, over live"], MAX_STEP),
        at_most(f"{query}, wall", asked["wall, vectors over text"], MAX_QUERY),
        at_most(f"{query}, CPU", asked["CPU, vectors over text"], MAX_QUERY),
        at_most(f"{query}, operations", asked["FLOP, vectors over text"], MAX_QUERY),
    ]


if __name__ == "__main__":
    sys.exit(main())
