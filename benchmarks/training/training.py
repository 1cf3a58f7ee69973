"""What does training from the cache cost, against cross-entropy alone and a live teacher?

One process a variant and round, one after another, variants interleaved (A B C D, A B C D, ...):
the same student (layers of SmolLM2-135M), rows, batch, optimizer, schedule, seed and float32.

- ``cross_entropy``: our trainer without a teacher, the yardstick of every ratio
- ``cached_threshold``, ``cached_exact``: our trainer, forward KL from the product's own tables
- ``cached_selected``: ``cached_threshold`` at a fifth of each row's positions, by the teacher's
  entropy; tokens are those of the rows, whether trained at or not
- ``cached_alm``, ``cached_alm_entries``: our trainer, likelihoods of spans, without and with the
  entries' KL: what a loss across tokenizers costs beside ``cached_threshold``, at equal rows
- ``live_ours``: our trainer and exact loss, the teacher's hidden states computed at every step
- ``live_trl_gkd``: TRL's GKD trainer, off-policy, forward KL at temperature 1
- ``stock_cross_entropy``: ``transformers.Trainer`` as it comes, with [B, T, V] logits

Speed is the median step after warm-up, in wall time and in CPU time of the process; a ratio is the
median over rounds of ratios within a round, and the bar takes whichever of the two varies less
from round to round (CPU time in a tie). Memory is the process's peak resident size, so everything
counts: libraries, weights, optimizer.

No live teacher can cost more than T / (3 S) of a step in theory (a forward pass of T parameters
beside forward and backward of S), so a cache gains at most 1 + T / (3 S): "ceiling".
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

from benchmarks.bars import (
    Bar,
    at_least,
    at_most,
    bars_table,
    benchmark_parser,
    finish,
    markdown_table,
)
from benchmarks.training.cached_tables import (
    QUICK_LAYERS,
    QUICK_SIZE,
    Size,
    Tables,
    prepared_tables,
)

ROOT = Path(__file__).resolve().parents[2]
MIN_SPEED, MAX_MEMORY = 0.92, 1.1
BASE = "cross_entropy"
QUICK_VARIANTS = (BASE, "cached_threshold", "cached_selected", "cached_exact", "live_trl_gkd")
SPANS_VARIANTS = ("cached_alm", "cached_alm_entries")
VARIANTS = (*QUICK_VARIANTS, *SPANS_VARIANTS, "live_ours", "stock_cross_entropy")
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is run; ``warmup`` steps are not measured."""

    size: Size
    layers: int
    batch_size: int
    steps: int
    warmup: int
    rounds: int
    variants: tuple[str, ...]

    @property
    def tokens_per_step(self) -> int:
        """Scored positions of a step; the first token of a row has none."""
        return self.batch_size * (self.size.length - 1)


FULL = Settings(
    size=Size(pages=40, length=256, heldout_fraction=0.0),
    layers=10,
    batch_size=4,
    steps=10,
    warmup=2,
    rounds=3,
    variants=VARIANTS,
)
QUICK = Settings(
    size=QUICK_SIZE,
    layers=QUICK_LAYERS,
    batch_size=4,
    steps=4,
    warmup=1,
    rounds=1,
    variants=QUICK_VARIANTS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write training.md and its plot to this folder")
    parser.add_argument("--rounds", type=int, help="instead of the 3 of a full run")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    rounds = options.rounds or settings.rounds
    tables = prepared_tables(options.cache, settings.size, layers=settings.layers)
    load = os.getloadavg()[0]
    print(f"load average at the start: {load:.1f} on {os.cpu_count()} cores", flush=True)
    answers = measure(settings, tables, rounds)
    measured = {name: Measured(settings, found) for name, found in answers.items()}
    rows = summary(measured, teacher_parameters(tables.teacher))
    bars = speed_and_memory(measured)
    status = finish(bars, rows, options.json)
    if options.docs:
        write_docs(options.docs, settings, rows, bars, f"{rounds} rounds, load {load:.1f}")
    return status


def measure(settings: Settings, tables: Tables, rounds: int) -> dict[str, list[Answer]]:
    """Run every variant once a round, never two at once."""
    answers: dict[str, list[Answer]] = {name: [] for name in settings.variants}
    for number in range(rounds):
        for name in settings.variants:
            answers[name].append(run_variant(name, settings, tables))
            last = answers[name][-1]
            seconds = ", ".join(f"{second:.2f}" for second in last["step_s"])
            print(f"round {number + 1} {name}: {seconds} s, {last['peak_mb']:.0f} MB", flush=True)
    return answers


def run_variant(name: str, settings: Settings, tables: Tables) -> Answer:
    """Start a process for one variant and return its answer."""
    job = {
        "variant": name,
        "student": str(tables.student),
        "teacher": str(tables.teacher),
        "documents": str(tables.documents),
        "signals": {encoding: str(folder) for encoding, folder in tables.signals.items()},
        "spans": str(tables.spans),
        "batch_size": settings.batch_size,
        "steps": settings.steps,
    }
    # As in the Makefile: OpenMP threads that spin while idle would be counted as work.
    environment = {"OMP_NUM_THREADS": str(os.cpu_count()), "KMP_BLOCKTIME": "0"} | dict(os.environ)
    environment |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        child = [sys.executable, str(ROOT / "benchmarks/training/training_variants.py")]
        done = subprocess.run(
            [*child, json.dumps(job), str(answer)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        result: Answer = json.loads(answer.read_text())
    return result


@dataclass(frozen=True, slots=True)
class Measured:
    """One variant's answers, a round each."""

    settings: Settings
    answers: list[Answer]

    def medians(self, clock: str) -> list[float]:
        """Return each round's median step, after warm-up, by ``step_s`` or ``step_cpu_s``."""
        return [statistics.median(a[clock][self.settings.warmup :]) for a in self.answers]

    def per_step(self, clock: str) -> float:
        """Return the median over rounds."""
        return statistics.median(self.medians(clock))

    @property
    def peak_mb(self) -> float:
        """The median over rounds of the process's peak."""
        return statistics.median(float(a["peak_mb"]) for a in self.answers)

    def speed_of(self, other: "Measured", clock: str) -> list[float]:
        """Return the speed of this variant over the other's, a round each."""
        mine, theirs = self.medians(clock), other.medians(clock)
        return [b / a for a, b in zip(mine, theirs, strict=True)]


def steadier(measured: Measured, base: Measured) -> tuple[str, float]:
    """Return the clock whose ratio varies less over the rounds, and that ratio's median."""
    ratios = {clock: measured.speed_of(base, clock) for clock in ("step_cpu_s", "step_s")}
    clock = min(ratios, key=lambda name: max(ratios[name]) - min(ratios[name]))
    return clock, statistics.median(ratios[clock])


def speed_and_memory(measured: Mapping[str, Measured]) -> list[Bar]:
    cached, base = measured["cached_threshold"], measured[BASE]
    clock, ratio = steadier(cached, base)
    label = "CPU time" if clock == "step_cpu_s" else "wall time"
    speed = f"speed of cached threshold over cross-entropy-only, by {label}"
    memory = "peak memory of cached threshold over cross-entropy-only"
    return [
        at_least(speed, round(ratio, 4), MIN_SPEED),
        at_most(memory, round(cached.peak_mb / base.peak_mb, 4), MAX_MEMORY),
    ]


def summary(measured: Mapping[str, Measured], teacher: int) -> list[dict[str, Any]]:
    """Return a row a variant, then the ceiling."""
    base, cached = measured[BASE], measured["cached_threshold"]
    student = base.answers[0]["parameters"]
    ceiling = 1 + teacher / (3 * student)
    rows: list[dict[str, Any]] = []
    for name, one in measured.items():
        tokens = one.settings.tokens_per_step
        row = {
            "variant": name,
            "tokens/s": round(tokens / one.per_step("step_s"), 1),
            "CPU s/1k tokens": round(1000 * one.per_step("step_cpu_s") / tokens, 3),
            "speed, wall": round(statistics.median(one.speed_of(base, "step_s")), 3),
            "speed, CPU": round(statistics.median(one.speed_of(base, "step_cpu_s")), 3),
            "peak MB": round(one.peak_mb),
            "memory": round(one.peak_mb / base.peak_mb, 3),
            "first loss": round(one.answers[0]["first_loss"], 4),
        }
        if name.startswith("live"):
            gain = statistics.median(cached.speed_of(one, "step_cpu_s"))
            row |= {"threshold gains, CPU": round(gain, 2), "of ceiling": round(gain / ceiling, 2)}
        rows.append(row)
    label = f"ceiling 1 + T/(3S): T {teacher / 1e6:.1f}M, S {student / 1e6:.1f}M"
    return [*rows, {"variant": label, "threshold gains, CPU": round(ceiling, 2)}]


def teacher_parameters(folder: Path) -> int:
    """Count from the weight files, without loading them."""
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # a handle is no mapping
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


PAGE = """# Training from the cache

Written by `python benchmarks/training/training.py --docs docs/measured/` ({when}). Steps of {batch}
rows of {length} tokens, float32, a student of {layers} layers of SmolLM2-135M, {cpus} cores, one
process a variant.

{table}

{bars}

![speed and memory](training.png)

How to read it:

- "speed" and "memory" are over `cross_entropy` (our trainer without a teacher), medians over rounds
  of ratios within a round. Wall time is what a user waits for; CPU time is steadier on a shared
  machine and hides what runs on one core only.
- Rows are decoded in the training process, so the cost of reading the cache is in every number.
- "threshold gains" is how much faster training from the `threshold` cache is than that live
  teacher; the ceiling is what leaving out a forward pass of T parameters can give a student of S.
  Above it, the rest comes from the loss.
- "first loss" is the same number for variants with the same objective on the same batch: GKD and
  `cached_exact` (KL to the teacher), and the two cross-entropies. `live_ours` leaves out the
  teacher's entropy, which is constant.
- Peak memory is the resident size of the whole process, libraries included.
- `cached_selected` trains at a fifth of the positions and runs whole rows: what it saves is head
  and loss of the others.
- The teacher here is only {ratio:.1f} times the student. A larger one costs a live step more and a
  cached step nothing.
"""


def write_docs(
    folder: Path, settings: Settings, rows: Sequence[Mapping[str, Any]], bars: Sequence[Bar],
    when: str,
) -> None:  # fmt: skip
    """Write the page and its plot."""
    ceiling = float(rows[-1]["threshold gains, CPU"])
    page = PAGE.format(
        when=when,
        batch=settings.batch_size,
        length=settings.size.length,
        layers=settings.layers,
        cpus=os.cpu_count(),
        table=markdown_table(rows),
        bars=bars_table(bars),
        ratio=3 * (ceiling - 1),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.md").write_text(page)
    plot(folder / "training.png", rows[:-1])


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw speed and peak memory side by side, over cross-entropy alone."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [row["variant"].replace("_", " ") for row in rows]
    colours = ["#3465a4" if name.startswith("cached") else "#babdb6" for name in names]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), sharey=True)
    panels = (("speed, CPU", "speed (1 = cross-entropy)"), ("memory", "peak memory (1 = same)"))
    for axis, (column, title) in zip(axes, panels, strict=True):
        drawn = axis.barh(names, [row[column] for row in rows], color=colours)
        axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
