"""An engine that waits for nobody: capture beside a running engine, and what follows it alone.

A stand-in engine takes the time of a set rate for each window and hands its rows over at once, as
vLLM does; the head is left out: top values, draws' masses and entropies of real positions are ready
(SmolLM2-135M on real text, made once, kept in the cache). All else is the product's: windows of
1 GiB (131,072 tokens of a model of width 4,096 in bfloat16), rows, shards, records, the disk.

*Before* is the path without overlap as it was: rows are made and written in the engine's thread,
every fraction is found by a binary search, zstd works at level 15.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.bars import (
    Bar,
    Row,
    at_least,
    at_most,
    bars_table,
    benchmark_parser,
    finish,
    machine,
    markdown_table,
)
from benchmarks.capture.ready_positions import (
    VOCAB_SIZE,
    AnyArray,
    K,
    Ready,
    StandInEngine,
    handed_over,
    real_ready,
)
from benchmarks.storage.real_positions import ROW_TOKENS, missing_asset
from pipeline.executors.shard_task import RowCount, ShardTask, write_output
from pipeline.executors.shard_work import run_shards
from schemas.distribution import STICK_LEVELS
from schemas.storage.files import sha256_of
from schemas.storage.shards import FAST_ZSTD_LEVEL, read_shard, write_shard
from schemas.tables.documents import DOCUMENTS, Document
from stages.signals.scoring.encoding import Measured
from stages.signals.teacher_logits import encoder as row_encoder
from stages.signals.teacher_logits import work
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.stage import Later

RATES = (150_000,)  # tokens a second
SPEED, CPU, BYTES = 0.95, 4.0, 1.013
BEFORE_ZSTD_LEVEL = 15
NOW, BEFORE = "now", "before"
# rows of each domain, rows a shard, shards, repetitions
FULL = (16, 1024, 6, 2)
QUICK = (16, 128, 2, 1)
STAGE = TeacherLogitsStage.model_validate(
    {
        "stage": "teacher_logits",
        "input": "-",
        "model": "-",
        "encoding": {"kind": "threshold", "k": K},
    }
)
BOUND = STAGE.table.bind(vocab_size=VOCAB_SIZE, sizes={"K": K})

TEXT = """# Capture beside a running engine

Regenerate with `python benchmarks/capture/overlap.py --docs docs/measured/` (the figures below come
from that run).

A stand-in engine takes the time of a set rate for each window of 131,072 tokens, looks up from its
device 128 times on the way (as often it needs Python's lock again), and hands the window's
positions over at once; a head is left out, its results on {positions:,} real positions of
SmolLM2-135M are ready. {shards} shards of {tokens:,} tokens each are made of them, {repetitions}
times, all ways in turns; medians, on cores that other work shared. *Before* is the same without
overlap, with zstd at level 15 and fractions found by binary search, as it was. *Speed / engine* is
the engine's own time over the whole run's, with every shard on the disk. The machine: {machine};
the engine takes none of its cores, as a GPU does not.

{rows}

## Bars

{bars}

The engine stays in the thread that opened it, rows are made and written in another, up to one
window behind (`pipeline/executors/overlap.py`), and the next shard begins while the last is
written. What is missing to 1 is the end, where the last window is written and the engine has
nothing to do (0.6 s of a run here, however long it is), and that both threads take turns at
Python's lock and at cores, which other work shared. Where a stage runs on several workers each has
one shard at a time, and overlaps within it only. What a CPU's head makes is made at once: it has no
other cores there than the engine's, and only writing goes on beside it.

Of what follows the engine now, about half is zstd at level 9 (1.1 us a token, 3.7 at level 15, the
least of several runs) and half the making of rows (1.1; fractions, draws, many small arrays): a
fourth of before would leave the rows little beside zstd. Level 9 costs {bytes_more:.1%} more bytes
than level 15. Lower levels were measured on the same positions and not taken: 7 costs 1.3 % for
0.94 us, 6 costs 3.5 % for 0.69, 3 costs 3.0 % for 0.44. One codec serves all columns of an Arrow
file, so none can be compressed harder than another.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write overlap.md there")
    options = parser.parse_args(arguments)
    if missing := missing_asset(options.cache):
        print(missing)
        return 2
    per_domain, per_shard, shards, repetitions = QUICK if options.quick else FULL
    ready = real_ready(options.cache, per_domain)
    rows = measure_ways(ready, per_shard, shards, repetitions, RATES)
    bars = judge(rows)
    if options.docs:
        values = {bar["name"]: bar["value"] for bar in bars}
        text = TEXT.format(
            positions=len(ready.num_head_N),
            shards=shards,
            tokens=per_shard * ROW_TOKENS,
            repetitions=repetitions,
            machine=machine(),
            rows=markdown_table(rows),
            bars=bars_table(bars),
            bytes_more=values["bytes of a shard, over before"] - 1,
        )
        options.docs.mkdir(parents=True, exist_ok=True)
        (options.docs / "overlap.md").write_text(text, encoding="utf-8")
    return finish(bars, rows, options.json)


def _add_threshold_before(encoder: Any, measured: Measured, start: int, tau: None) -> None:
    """Encode a block as it was before: every fraction is rounded, by a binary search."""
    k = encoder.most
    uniforms_PN = encoder.uniforms_PN[start : start + len(measured.total_P)]
    offsets_P = torch.from_numpy(uniforms_PN[:, 0].copy()).to(measured.exp_PV.device)
    sample = vars(row_encoder)["threshold_sample"](measured, offsets_P, k=k)
    num_head_P = sample.num_head_P.cpu().numpy()
    codes_PK = _quantise_before(sample.fractions_PK.cpu().numpy(), uniforms_PN[:, 1:])
    encoder._keep("token_ids_PK", sample.token_ids_PK)
    encoder.columns.setdefault("num_head_P", []).append(num_head_P.astype(np.uint8))
    in_head_PK = np.arange(k) < num_head_P[:, None]
    encoder.columns.setdefault("head_codes_E", []).append(codes_PK[in_head_PK])


def _quantise_before(fractions_PK: AnyArray, uniforms_PK: AnyArray) -> npt.NDArray[np.uint8]:
    clipped = np.clip(np.asarray(fractions_PK, np.float64), 0.0, 1.0)
    low = np.clip(np.searchsorted(STICK_LEVELS, clipped, side="right") - 1, 0, 62)
    step = STICK_LEVELS[low + 1] - STICK_LEVELS[low]
    up = np.asarray(uniforms_PK) < (clipped - STICK_LEVELS[low]) / step
    return np.asarray(low + up, np.uint8)


def tasks_in(folder: Path, per_shard: int, shards: int) -> list[ShardTask]:
    """Write the documents that the engine is given; each has a key of its own."""
    bound = DOCUMENTS.bind(vocab_size=VOCAB_SIZE)
    ids_T = np.arange(ROW_TOKENS)
    tasks = []
    for index in range(shards):
        keys = [f"{index * per_shard + row:032x}" for row in range(per_shard)]
        file = folder / f"documents-{index}.arrow"
        documents = [Document(sample_id=key, split="train", input_ids_T=ids_T) for key in keys]
        write_shard(file, bound, documents, zstd_level=FAST_ZSTD_LEVEL)
        tasks.append(
            ShardTask(
                folder / "out", index, shards, "train", file, sha256_of(file), per_shard, 0.0, {}
            )
        )
    return tasks


@dataclass(frozen=True)
class Made:
    """All shards made once: seconds of the wall and of processors, bytes, and what they hold."""

    seconds: float
    cpu_seconds: float
    num_bytes: int
    sha256: tuple[str, ...]


def make(way: str, tasks: Sequence[ShardTask], engine: StandInEngine) -> Made:
    """Make all shards, one way or the other."""
    clock, cpu = time.perf_counter(), time.process_time()
    if way == NOW:
        records = list(
            run_shards(tasks, BOUND, lambda shard: work.score_shard(STAGE, engine, shard), {})
        )
    else:
        with patch.object(row_encoder.RowEncoder, "_add_threshold", _add_threshold_before):
            records = [_made_before(task, engine) for task in tasks]
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    num_bytes = sum(record.num_bytes for record in records)
    return Made(seconds, cpu_seconds, num_bytes, tuple(record.sha256 for record in records))


def _made_before(task: ShardTask, engine: StandInEngine) -> Any:
    assert isinstance(task.input_file, Path)
    scored = work.score_shard(STAGE, engine, read_shard(task.input_file))
    rows = RowCount(row.make() if isinstance(row, Later) else row for row in scored)
    level = BEFORE_ZSTD_LEVEL
    return write_output(
        task.folder, task.name, BOUND, rows, split="train", made_by={}, zstd_level=level
    )


def measure_ways(
    ready: Ready, per_shard: int, shards: int, repetitions: int, rates: Sequence[float]
) -> list[Row]:
    """Return a row for each way and rate, and for each way with an engine that takes no time."""
    rows: list[Row] = []
    num_tokens = per_shard * shards * ROW_TOKENS
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder, handed_over(ready):
        tasks = tasks_in(Path(folder), per_shard, shards)
        for rate in (float("inf"), *rates):
            engine = StandInEngine(rate, ready.num_rows)
            runs: dict[str, list[Made]] = {BEFORE: [], NOW: []}
            alone = []
            for _ in range(repetitions):
                alone.append(_alone(engine, per_shard, shards))
                for way, made in runs.items():
                    made.append(make(way, tasks, engine))
            rows += [_as_row(way, rate, made, alone, num_tokens) for way, made in runs.items()]
            print(f"{rate:,.0f} tokens/s: done", flush=True)
    return rows


def _alone(engine: StandInEngine, per_shard: int, shards: int) -> float:
    """Return the seconds that the engine takes for all shards when nobody else does anything."""
    clock = time.perf_counter()
    for _ in range(shards):
        for _states in engine.hidden_states([np.arange(ROW_TOKENS)] * per_shard):
            pass
    return time.perf_counter() - clock


def _as_row(
    way: str, rate: float, made: Sequence[Made], alone: Sequence[float], num_tokens: int
) -> Row:
    shares = [one / run.seconds for one, run in zip(alone, made, strict=True)]
    is_timed = rate != float("inf")
    return {
        "way": way,
        "engine, tokens/s": round(rate) if is_timed else "no time",
        "tokens/s": round(num_tokens / statistics.median(run.seconds for run in made)),
        "speed / engine": round(statistics.median(shares), 3) if is_timed else None,
        "CPU us a token": round(
            1e6 * statistics.median(m.cpu_seconds for m in made) / num_tokens, 3
        ),
        "bytes a token": round(made[0].num_bytes / num_tokens, 3),
    }


def judge(rows: Sequence[Row]) -> list[Bar]:
    """Return the bars: speed at each rate, processor time and bytes."""
    by = {(row["way"], row["engine, tokens/s"]): row for row in rows}
    before, now = by[BEFORE, "no time"], by[NOW, "no time"]
    speeds = [
        at_least(
            f"speed over the engine's own at {rate:,} tokens/s", by[key]["speed / engine"], SPEED
        )
        for rate in RATES
        if (key := (NOW, rate)) in by
    ]
    cpu = before["CPU us a token"] / now["CPU us a token"]
    return [
        *speeds,
        at_least("tokens a core-second after the engine, over before", round(cpu, 3), CPU),
        at_most(
            "bytes of a shard, over before",
            round(now["bytes a token"] / before["bytes a token"], 4),
            BYTES,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
