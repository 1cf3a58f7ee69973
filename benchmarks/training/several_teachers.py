"""What do several teachers cost beside plain ``kd``, on the same rows and cached signals?

One process and one batch of real rows: the student's forward, head, loss and backward, plain and
with each arrangement of teachers in turn (A B C, A B C, ...), in CPU time of the process, which
counts both cores. The optimizer and the reading of rows are left out. A ratio is the median over
rounds of ratios to plain ``kd`` of the same encoding in the same round. "head and loss" is the part
that differs: the same with the student's hidden states computed before.

A teacher is mixed with itself: what it says does not decide what it costs.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import (
    Bar,
    at_most,
    bars_table,
    benchmark_parser,
    finish,
    machine,
    markdown_table,
)
from benchmarks.training.cached_tables import QUICK_LAYERS, QUICK_SIZE, Size, prepared_tables
from benchmarks.training.divergences import Fixed, timed
from stages.models.causal_lm.model import load_student, student_vocab_size
from stages.student.batches.several_datasets import open_data_sets
from stages.student.batches.training_data import TrainingData, teacher_heads_of
from stages.student.losses.step import Step, Term
from stages.student.objectives.kd import KdConfig

CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {  # base, what follows the rows, mixture
    "kd, tau-0.04": ("", ["tau-0.04"], {}),
    "two mixed, tau-0.04": ("kd, tau-0.04", ["tau-0.04"] * 2, {"kind": "arithmetic"}),
    "three mixed, tau-0.04": ("kd, tau-0.04", ["tau-0.04"] * 3, {"kind": "arithmetic"}),
    "two data sets, tau-0.04": ("kd, tau-0.04", ["tau-0.04", "documents", "tau-0.04"], {}),
    "kd, exact": ("", ["exact"], {}),
    "two mixed, exact, arithmetic": ("kd, exact", ["exact"] * 2, {"kind": "arithmetic"}),
    "two mixed, exact, geometric": ("kd, exact", ["exact"] * 2, {"kind": "geometric"}),
}
MOST = 1.5  # of a whole step with two teachers, over plain kd
FULL, LAYERS = Size(pages=40, length=256, heldout_fraction=0.0), 10
CPU = torch.device("cpu")

PAGE = """# What several teachers cost

Written by `python benchmarks/training/several_teachers.py --docs docs/measured/` ({machine}).
A batch of {rows} rows of {length} tokens ({positions:,} positions), float32, a student of {layers}
layers of SmolLM2-135M; {rounds} rounds.

{table}

{bars}

How to read it:

- "step" is the student's forward, head, loss and backward in CPU seconds for 1,000 positions,
  without the optimizer; "head and loss" is the same on hidden states that are there already. The
  ratios are over plain `kd` of the same encoding in the same round, medians over rounds.
- A teacher is mixed with itself, as what it says does not decide what it costs. Of "two data sets"
  half of the batch's rows are of each.
"""


@dataclass(frozen=True)
class Case:
    """One batch and the step that reads it."""

    objective: KdConfig
    batch: dict[str, Any]
    step: Step

    def whole(self) -> list[Term]:
        """The loss with the student's forward."""
        return self.objective.terms(self.batch, self.step)

    def part(self) -> list[Term]:
        """The loss on hidden states that are there."""
        with torch.no_grad():
            hidden_ND = self.step.hidden_states(self.batch)
        fixed: Any = Fixed(self.step, hidden_ND.requires_grad_())
        return self.objective.terms(self.batch, fixed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write several_teachers.md to this folder")
    options = parser.parse_args(arguments)
    size, layers = (QUICK_SIZE, QUICK_LAYERS) if options.quick else (FULL, LAYERS)
    num_rows, rounds = (4, 2) if options.quick else (2, 5)
    tables = prepared_tables(options.cache, size, layers=layers)
    folders = {**tables.signals, "documents": tables.documents}
    model = load_student(tables.student, device=CPU)
    cases = {name: case_of(name, folders, model, num_rows) for name in CASES}
    positions = len(next(iter(cases.values())).batch["positions_N"])
    rows = summary(measure(cases, rounds), positions)
    bars = [dearest(rows)]
    if options.docs:
        page = PAGE.format(
            machine=machine(),
            rows=num_rows,
            length=size.length,
            positions=positions,
            layers=layers,
            rounds=rounds,
            table=markdown_table(rows),
            bars=bars_table(bars),
        )
        options.docs.mkdir(parents=True, exist_ok=True)
        (options.docs / "several_teachers.md").write_text(page, encoding="utf-8")
    return finish(bars, rows, options.json)


def case_of(name: str, folders: Mapping[str, Path], model: Any, num_rows: int) -> Case:
    """Open the tables of one case and make its batch, of the same rows as any other."""
    _, behind, mixture = CASES[name]
    tables = [folders["documents"], *(folders[table] for table in behind)]
    dataset = open_data_sets(tables, split="train", verify=False)
    if mixture:
        mixture = {**mixture, "weights": [1.0] * len(behind)}
    objective = KdConfig.model_validate({"mixture": mixture or None})
    rows, collate = objective.batches(TrainingData(dataset, None, student_vocab_size(model), 0))
    half = len(dataset) // len(dataset.data_sets)
    indices = [i if i % 2 == 0 or half == len(dataset) else half + i for i in range(num_rows)]
    heads = teacher_heads_of(dataset, CPU)
    first = next(iter(heads.values()), None)
    step = Step(model, model, torch.float32, first, None, 1 << 16, 0.0, teacher_heads=heads)
    return Case(objective, collate([rows[index] for index in indices]), step)


def measure(cases: Mapping[str, Case], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return CPU seconds of a whole step and of head and loss, a pair a round and case.

    The first round warms up and is left out.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            whole = timed(case.step.bare, case.whole)
            part = timed(case.step.bare, case.part)
            if number:
                seconds[name].append((whole, part))
                print(f"round {number} {name}: {whole:.2f} s, {part:.2f} s", flush=True)
    return seconds


def summary(
    seconds: Mapping[str, Sequence[tuple[float, float]]], positions: int
) -> list[dict[str, Any]]:
    """Return a row a case."""
    rows = []
    for name, pairs in seconds.items():
        base = seconds[CASES[name][0] or name]
        row: dict[str, Any] = {"teachers": name}
        for place, label in enumerate(("step", "head and loss")):
            ratios = [mine[place] / one[place] for mine, one in zip(pairs, base, strict=True)]
            spent = statistics.median(pair[place] for pair in pairs)
            row[f"{label}, CPU s/1k"] = round(1000 * spent / positions, 3)
            row[f"{label}, over kd"] = round(statistics.median(ratios), 3)
        rows.append(row)
    return rows


def dearest(rows: Sequence[Mapping[str, Any]]) -> Bar:
    """Return the bar on the step of two teachers that costs most."""
    two = [row for row in rows if str(row["teachers"]).startswith("two")]
    most = max(two, key=lambda row: float(row["step, over kd"]))
    return at_most(f"CPU time of a step, {most['teachers']} over kd", most["step, over kd"], MOST)


if __name__ == "__main__":
    sys.exit(main())
