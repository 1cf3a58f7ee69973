"""How many shards a second do one and two workers make, on Ray and on this machine's processes?

The stage costs every shard the same single-threaded processor time (``burn_stage``), so two cores
can show what handing out work loses. A repetition runs all ways in turns, and what is judged is the
median over repetitions of the ratio within one. *bare* is the machine's own answer: processes that
burn the same rounds with no executor, no files and no Ray; where it does not reach twice the speed,
other work had the cores.

A rate is taken between two records in the middle of a run: starting and ending workers is left out.
Ray's overhead a shard is the time between records of shards that cost nothing, less that of the
same shards in this process: one message there, one back, and finding the next worker.
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bars import (
    Bar,
    at_least,
    at_most,
    bars_table,
    benchmark_parser,
    finish,
    markdown_table,
)
from benchmarks.scaling.burn_stage import VOCAB_SIZE, BurnStage, burn, make_tasks
from pipeline.executors.dispatch import Limits
from pipeline.executors.local.shards import run_local
from pipeline.executors.ray_cluster.shards import run_on_ray
from schemas.storage.records import ShardRecord
from stages.models.spec import EngineOptions
from stages.stage import StageContext

FULL, QUICK = (24, 0.5, 3), (14, 0.3, 1)  # shards, seconds of one core a shard, repetitions
EMPTY_SHARDS = 200
MIN_EFFICIENCY, MAX_OVERHEAD_MS = 0.9, 20.0
WAYS = ("bare", "local", "ray")

PAGE = """# Executors: what handing out shards costs

Written by `python benchmarks/scaling/scaling.py --docs docs/measured/`. A stage of {seconds:g} s of
one core a shard (a loop in Python, one thread), {shards} shards, {repetitions} repetitions of all
ways in turns; 2 CPU cores, shared with other work. "efficiency" is shards a second of two workers
over twice those of one, the median over repetitions. "bare" is two processes without an executor:
what the machine itself had to give at the time.

{bars}

{rows}

Ray's overhead is the time between two records of shards that cost nothing on one Ray worker, less
the same in this process. It does not depend on the shard: a shard of a minute of a teacher's work
does not notice it. Start-up is left out: {start} s from the call to the first record on a Ray
of the run's own, against {start_local} s with local processes.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write executors.md to this folder")
    options = parser.parse_args(arguments)
    num_shards, seconds, repetitions = QUICK if options.quick else FULL
    rounds = rounds_of(seconds)
    runs = [
        measure(way, workers, num_shards, rounds)
        for _ in range(repetitions)
        for way in WAYS
        for workers in (1, 2)
    ]
    overhead_ms = 1000 * (empty_interval("ray") - empty_interval("local"))
    rows = summary(runs)
    bars = judge(rows, overhead_ms)
    status = finish(bars, rows, options.json)
    if options.docs:
        page = PAGE.format(
            seconds=seconds,
            shards=num_shards,
            repetitions=repetitions,
            bars=bars_table(bars),
            rows=markdown_table(rows),
            start=f"{_start(runs, 'ray'):.1f}",
            start_local=f"{_start(runs, 'local'):.1f}",
        )
        (options.docs / "executors.md").write_text(page, encoding="utf-8")
    return status


def rounds_of(seconds: float) -> int:
    """Return how many rounds take one core so long."""
    clock = time.process_time()
    burn(1_000_000)
    return int(1_000_000 * seconds / (time.process_time() - clock))


def measure(way: str, workers: int, num_shards: int, rounds: int) -> dict[str, Any]:
    """Run all shards one way; the rate leaves out what starting and ending workers costs."""
    if way == "bare":
        rate = bare_rate(workers, num_shards, rounds)
        return {"way": way, "workers": workers, "rate": rate, "start": 0.0}
    start, times = record_times(way, workers, num_shards, rounds)
    middle = times[2 * workers - 1 : num_shards - workers]
    rate = (len(middle) - 1) / (middle[-1] - middle[0])
    return {"way": way, "workers": workers, "rate": rate, "start": times[0] - start}


def record_times(way: str, workers: int, num_shards: int, rounds: int) -> tuple[float, list[float]]:
    """Return when a run was asked for, and when each of its records came."""
    with tempfile.TemporaryDirectory() as folder:
        records = run(way, workers, Path(folder), num_shards, rounds)
        return time.perf_counter(), [time.perf_counter() for _ in records]


def run(
    way: str, workers: int, folder: Path, num_shards: int, rounds: int
) -> Iterator[ShardRecord]:
    tasks = make_tasks(folder, num_shards)
    context = StageContext(tasks[0].folder, VOCAB_SIZE, engine=EngineOptions(num_threads=1))
    stage = BurnStage(rounds=rounds)
    limits = Limits(workers, max_attempts=1, shard_timeout_s=None)
    if way == "ray":
        return run_on_ray(stage, context, tasks, limits, address=None, warned=print)
    return run_local(stage, context, tasks, limits, warned=print)


def bare_rate(workers: int, num_shards: int, rounds: int) -> float:
    """Burn the same in processes that know nothing of each other."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(workers + 1)
    count = num_shards // workers
    processes = [
        spawn.Process(target=burn_many, args=(barrier, count, rounds)) for _ in range(workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    clock = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - clock
    for process in processes:
        process.join()
    return workers * count / seconds


def burn_many(barrier: Any, count: int, rounds: int) -> None:
    barrier.wait()
    for _ in range(count):
        burn(rounds)
    barrier.wait()


def empty_interval(way: str) -> float:
    """Return the median time between records of shards that cost nothing, one worker, in s."""
    _, times = record_times(way, 1, EMPTY_SHARDS, 0)
    return median(later - earlier for earlier, later in pairwise(times))


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for way in WAYS:
        one, two = (
            [r["rate"] for r in runs if (r["way"], r["workers"]) == (way, n)] for n in (1, 2)
        )
        ratios = [b / a / 2 for a, b in zip(one, two, strict=True)]
        rows.append(
            {
                "way": way,
                "shards/s, 1 worker": median(one),
                "shards/s, 2 workers": median(two),
                "efficiency": median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
        )
    return rows


def _start(runs: Sequence[dict[str, Any]], way: str) -> float:
    return float(median(r["start"] for r in runs if (r["way"], r["workers"]) == (way, 2)))


def judge(rows: Sequence[dict[str, Any]], overhead_ms: float) -> list[Bar]:
    efficiency = {row["way"]: row["efficiency"] for row in rows}
    return [
        at_least("Ray, two workers: efficiency", efficiency["ray"], MIN_EFFICIENCY),
        at_least("local, two workers: efficiency", efficiency["local"], MIN_EFFICIENCY),
        at_most("Ray's overhead a shard, ms", overhead_ms, MAX_OVERHEAD_MS),
    ]


if __name__ == "__main__":
    sys.exit(main())
