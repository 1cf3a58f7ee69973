"""What does each divergence cost beside plain ``kd``, on the same cached hidden states?

One process and one batch of real rows: the student's forward, head, loss and backward with each
objective in turn (A B C, A B C, ...), in CPU time of the process, which counts both cores. The
optimizer is left out, as it is the same for all. A ratio is the median over rounds of ratios to
plain ``kd`` of the same round. "head and loss" is the part that differs: the same with the
student's hidden states computed before.

Memory is not measured apart: all of a chunk's [C, V] blocks together keep to one budget, so a loss
with more of them has smaller chunks. "blocks" says how many there are beside the log-probs.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from schemas.dataset import open_dataset
from stages.models.causal_lm.chunked_loss import PositionLoss
from stages.models.causal_lm.model import load_student, student_vocab_size
from stages.student.batches.signals import Collator
from stages.student.batches.training_data import teacher_head_of
from stages.student.losses.step import Step, Term
from stages.student.objectives.kd import KdConfig

BASE = "kd"
OBJECTIVES: dict[str, dict[str, Any]] = {
    BASE: {},
    "kd, temperature 2": {"temperature": 2.0},
    "reverse_kl": {"divergence": {"kind": "reverse_kl"}},
    "skewed_kl": {"divergence": {"kind": "skewed_kl"}},
    "skewed_reverse_kl": {"divergence": {"kind": "skewed_reverse_kl"}},
    "jensen_shannon": {"divergence": {"kind": "jensen_shannon"}},
    "total_variation": {"divergence": {"kind": "total_variation"}},
    "kd, weight 0.5": {"weight": 0.5},
    "jensen_shannon, temperature 2, weight 0.5": {
        "divergence": {"kind": "jensen_shannon"},
        "temperature": 2.0,
        "weight": 0.5,
    },
}
MOST = 1.25  # of a whole step, over plain kd
FULL, LAYERS = Size(pages=60, length=128, heldout_fraction=0.1), 4  # the tables of quality.py
CPU = torch.device("cpu")

PAGE = """# What each divergence costs

Written by `python benchmarks/training/divergences.py --docs docs/measured/` ({machine}). A batch of
{rows} rows of {length} tokens ({positions:,} positions), float32, a student of {layers} layers of
SmolLM2-135M, the teacher's rows in encoding `exact`; {rounds} rounds.

{table}

{bars}

How to read it:

- `kd` is the forward KL at temperature 1, which every encoding has; from `exact` it is the
  yardstick here. Other encodings are cheaper: [training.md](training.md).
- "step" is the student's forward, head, loss and backward in CPU seconds for 1,000 positions,
  without the optimizer; "head and loss" is the same on hidden states that are there already. The
  ratios are over `kd` in the same round, medians over rounds.
- "blocks" are [C, V] blocks beside the student's log-probs. A chunk's blocks keep to one budget
  together, so more of them make smaller chunks and no larger peak.
"""


@dataclass(frozen=True)
class Fixed:
    """A step whose hidden states are there: what is left is the head and the loss."""

    step: Step
    hidden_ND: Tensor

    @property
    def teacher_head(self) -> Any:
        return self.step.teacher_head

    @property
    def teacher_heads(self) -> Any:
        return self.step.teacher_heads

    def over_positions(self, batch: dict[str, Any], objective: PositionLoss) -> Term:
        return self.step.over(self.hidden_ND, objective)


@dataclass(frozen=True)
class Blocks:
    """Asks a loss for its number of blocks, and computes nothing."""

    teacher_head: Any
    found: list[int]

    def over_positions(self, batch: dict[str, Any], objective: PositionLoss) -> Term:
        self.found.append(objective.extra_blocks)
        return Term(torch.zeros(()), {}, "tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write divergences.md to this folder")
    options = parser.parse_args(arguments)
    size, layers = (QUICK_SIZE, QUICK_LAYERS) if options.quick else (FULL, LAYERS)
    num_rows, rounds = (4, 1) if options.quick else (4, 2)
    tables = prepared_tables(options.cache, size, layers=layers)
    dataset = open_dataset(list(tables.joined("exact")), split="train", verify=False)
    model = load_student(tables.student, device=CPU)
    head = teacher_head_of(dataset, CPU)
    batch = Collator("exact", student_vocab_size(model))([dataset[i] for i in range(num_rows)])
    step = Step(model, model, torch.float32, head, None, 1 << 16, 0.0)
    seconds = measure(step, batch, rounds)
    rows = summary(seconds, blocks_of(batch, head), len(batch["positions_N"]))
    bars = [dearest(rows)]
    if options.docs:
        page = PAGE.format(
            machine=machine(),
            rows=num_rows,
            length=size.length,
            positions=len(batch["positions_N"]),
            layers=layers,
            rounds=rounds,
            table=markdown_table(rows),
            bars=bars_table(bars),
        )
        options.docs.mkdir(parents=True, exist_ok=True)
        (options.docs / "divergences.md").write_text(page, encoding="utf-8")
    return finish(bars, rows, options.json)


def measure(step: Step, batch: dict[str, Any], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return CPU seconds of a whole step and of head and loss, a pair a round and objective.

    The first round warms up and is left out.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in OBJECTIVES}
    for number in range(rounds + 1):
        for name, settings in OBJECTIVES.items():
            objective = KdConfig.model_validate(settings)
            whole = timed(step.bare, lambda o=objective: o.terms(batch, step))  # type: ignore[misc]
            with torch.no_grad():
                hidden_ND = step.hidden_states(batch)
            fixed: Any = Fixed(step, hidden_ND.requires_grad_())
            part = timed(step.bare, lambda o=objective, f=fixed: o.terms(batch, f))  # type: ignore[misc]
            if number:
                seconds[name].append((whole, part))
                print(f"round {number} {name}: {whole:.2f} s, {part:.2f} s", flush=True)
    return seconds


def timed(model: Any, terms: Callable[[], list[Term]]) -> float:
    """Return CPU seconds of one loss and its backward."""
    started = time.process_time()
    (term,) = terms()
    torch.autograd.backward(term.total)
    spent = time.process_time() - started
    model.zero_grad(set_to_none=True)
    return spent


def blocks_of(batch: dict[str, Any], head: Any) -> dict[str, int]:
    """Return each loss's number of [C, V] blocks."""
    found: list[int] = []
    counter: Any = Blocks(head, found)
    for settings in OBJECTIVES.values():
        KdConfig.model_validate(settings).terms(batch, counter)
    return dict(zip(OBJECTIVES, found, strict=True))


def summary(
    seconds: Mapping[str, Sequence[tuple[float, float]]], blocks: Mapping[str, int], positions: int
) -> list[dict[str, Any]]:
    """Return a row an objective."""
    rows = []
    for name, pairs in seconds.items():
        row: dict[str, Any] = {"objective": name, "blocks": blocks[name]}
        for place, label in enumerate(("step", "head and loss")):
            ratios = [
                mine[place] / base[place] for mine, base in zip(pairs, seconds[BASE], strict=True)
            ]
            spent = statistics.median(pair[place] for pair in pairs)
            row[f"{label}, CPU s/1k"] = round(1000 * spent / positions, 3)
            row[f"{label}, over kd"] = round(statistics.median(ratios), 3)
        rows.append(row)
    return rows


def dearest(rows: Sequence[Mapping[str, Any]]) -> Bar:
    """Return the bar on the step that costs most."""
    most = max(rows, key=lambda row: float(row["step, over kd"]))
    return at_most(f"CPU time of a step, {most['objective']} over kd", most["step, over kd"], MOST)


if __name__ == "__main__":
    sys.exit(main())
