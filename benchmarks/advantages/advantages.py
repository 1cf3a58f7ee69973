"""Bytes a response position against what they buy: the error of ADPA's gradient, by support.

With pi the student and A the advantage, ADPA's gradient with respect to the student's logits is
``pi_v (A_v - sum_a pi_a A_a)`` at a position. Each support gives an approximation of it, made by
the product's loss from rows that the product has written and read. Against the full vocabulary:

- "mean gradient": relative error |e| / |g| of the sum over all positions, which is that of an
  output bias: noise averages out in it and bias does not, as in a parameter's gradient. Its cosine.
- "position": relative error of all positions as one long vector.

Bytes are those of whole shard files, over response positions: token ids, sums and schema counted.

Dimensions: P = response positions, C = those of a chunk, A = tokens of one response,
V = vocabulary, K = kept tokens, D = hidden width.
"""

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.advantages.advantages_report import PAGE
from benchmarks.advantages.expected_error import expected_square
from benchmarks.advantages.preference_positions import (
    DPO_STEPS,
    KD_STEPS,
    MODEL,
    Ids,
    aligned_teacher,
    cached_responses,
    distilled_student,
    missing_asset,
    read_pairs,
)
from benchmarks.bars import Bar, at_most, benchmark_parser, finish, markdown_table, text_table
from benchmarks.storage.column_bytes import bytes_by_column
from benchmarks.storage.signal_error import Comparison
from schemas.advantage_values import advantage_values
from schemas.sample_id import sample_id_of
from schemas.storage.shards import read_shard, write_shard
from schemas.tables.prompted.responses import Responses
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.engines.engine import open_engine
from stages.models.spec import EngineOptions, ModelSpec
from stages.signals.advantages.stage import AdvantagesStage, ThresholdSupport
from stages.signals.advantages.supports import Scored, StudentTop
from stages.signals.advantages.work import Asked, score_row
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.scoring.responses import Prompted
from stages.stage import Rejected, StageContext
from stages.student.losses.advantage import CLIP, ExactSupport, SparseSupport, Support

FULL, QUICK = (40, 96, 5), (6, 48, 1)  # prompts, longest responses, seeds of each threshold
TOP = 16  # likeliest tokens that the student's responses carry
CHUNK = 64
MAX_BYTES = 96.0
PUBLISHED_BYTES = 2 * 816.0
MAX_TAU_BYTES = 55.0
BARRED, RELEASED = "threshold, k = 16", "as_released, k = 50"
DEFAULT = "threshold, tau = 0.002"
MEASURES = {
    "mean gradient": "mean gradient's error",
    "position": "positions' error",
    "expected of it": "either error, as expected over draws",
}
SUPPORTS: dict[str, dict[str, Any]] = {
    "threshold, k = 8": {"kind": "threshold", "k": 8},
    BARRED: {"kind": "threshold", "k": 16},
    "threshold, k = 24": {"kind": "threshold", "k": 24},
    "threshold, tau = 0.006": {"kind": "threshold", "tau": 0.006},
    "threshold, tau = 0.003": {"kind": "threshold", "tau": 0.003},
    DEFAULT: {"kind": "threshold"},
    "threshold, tau = 0.0014": {"kind": "threshold", "tau": 0.0014},
    "union_top_k, k = 8": {"kind": "union_top_k", "k": 8},
    "union_top_k, k = 16": {"kind": "union_top_k", "k": 16},
    RELEASED: {"kind": "as_released", "k": 50},
    "exact": {"kind": "exact"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write advantages.md to this folder")
    options = parser.parse_args(arguments)
    cache: Path = options.cache
    if problem := missing_asset(cache):
        print(problem)
        return 2
    num_prompts, num_tokens, num_seeds = QUICK if options.quick else FULL
    training, measured = read_pairs(cache)
    models = aligned_teacher(cache, training), cache / MODEL
    student = distilled_student(cache, training)
    prompts = [pair.prompt_T for pair in measured[:num_prompts]]
    responses = cached_responses(cache, student, prompts, num_tokens)
    seen = look(models, student, prompts, responses, cache)
    with tempfile.TemporaryDirectory(prefix="advantages-") as work:
        tables = [
            written(name, seed, seen, Path(work))
            for name in SUPPORTS
            for seed in range(num_seeds if "threshold" in name else 1)
        ]
    found = measure(tables, seen)
    rows = results(tables, found)
    bars = judge(rows)
    by_column = columns(tables, (BARRED, DEFAULT))
    print(text_table(by_column), end="\n\n")
    if options.docs is not None:
        shown = [{"bar": b["name"], "value": b["value"], "target": b["target"]} for b in bars]
        page = PAGE.format(
            positions=f"{seen.num_positions:,}",
            prompts=len(prompts),
            dpo_steps=DPO_STEPS,
            kd_steps=KD_STEPS,
            seeds=num_seeds,
            top=TOP,
            width=seen.student_PD.shape[1],
            mean_advantage=found.size,
            known=found.known,
            bars=markdown_table(shown),
            rows=markdown_table(rows),
            columns=markdown_table(by_column),
        )
        (options.docs / "advantages.md").write_text(page)
    return finish(bars, [*rows, *by_column], options.json, shown=rows)


@dataclass(frozen=True)
class Seen:
    """The student's responses, and what the three models make of them: states [P, D] and heads."""

    rows: list[Responses]
    teachers_PD: tuple[Tensor, Tensor]
    student_PD: Tensor
    heads: tuple[LanguageHead, LanguageHead]
    student_head: LanguageHead

    @property
    def num_positions(self) -> int:
        """Tokens of all responses."""
        return len(self.student_PD)

    def student_logprobs(self, at: slice) -> Tensor:
        """Return the student's log-probs [C, V] at some positions."""
        return self.student_head.logits(self.student_PD[at]).log_softmax(1)


def look(
    models: tuple[Path, Path],
    student: Path,
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    cache: Path,
) -> Seen:
    """Run all three models over the responses with the product's transformers engine."""
    options = EngineOptions(device="cpu", cache_dir=cache / "benchmarks" / "head_check")
    fed = [np.concatenate([p, r[:-1]]) for p, r in zip(prompts, responses, strict=True)]
    states, heads = [], []
    for folder in (*models, student):
        with open_engine("transformers", folder, dtype="float32", options=options) as engine:
            states.append(torch.cat(engine.last_hidden_states(fed, [len(r) for r in responses])))
            heads.append(engine.head)
    rows, start = [], 0
    for prompt_T, response_A in zip(prompts, responses, strict=True):
        states_AD = states[2][start : start + len(response_A)]
        rows.append(as_row(prompt_T, response_A, heads[2].logits(states_AD).log_softmax(1)))
        start += len(response_A)
    return Seen(rows, (states[0], states[1]), states[2], (heads[0], heads[1]), heads[2])


def as_row(prompt_T: Ids, response_A: Ids, logprobs_AV: Tensor) -> Responses:
    """Return a row of the table that the stage reads, with the student's likeliest tokens."""
    top = logprobs_AV.topk(TOP, dim=1)
    own_A = logprobs_AV.gather(1, torch.from_numpy(response_A)[:, None])[:, 0]
    return Responses(
        sample_id=sample_id_of(np.concatenate([prompt_T, response_A])),
        prompt_ids_T=prompt_T,
        response_ids_A=response_A,
        response_lengths_N=np.array([len(response_A)], np.int32),
        finish_reasons_N=np.zeros(1, np.uint8),
        logprobs_A=own_A.numpy(),
        top_ids_AK=top.indices.numpy(),
        top_logprobs_AK=top.values.numpy().astype(np.float16),
    )


@dataclass
class GradientError:
    """Errors of a gradient: of single positions, and of the sum over all."""

    positions: Comparison = field(default_factory=Comparison)
    error_V: Tensor = field(default_factory=lambda: torch.zeros(()))
    gradient_V: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, error_CV: Tensor, gradient_CV: Tensor) -> None:
        """Count a chunk."""
        self.positions.add(error_CV, gradient_CV)
        self.error_V = self.error_V + error_CV.sum(0)
        self.gradient_V = self.gradient_V + gradient_CV.sum(0)

    @property
    def total(self) -> Comparison:
        """Of the sum over all positions."""
        comparison = Comparison()
        comparison.add(self.error_V, self.gradient_V)
        return comparison


@dataclass(frozen=True)
class Written:
    """A table of one support: bytes a position, in all and by column, and losses with errors."""

    name: str
    bytes_per_position: float
    columns: dict[str, float]
    losses: dict[str, Support]
    errors: dict[str, GradientError]


def written(name: str, seed: int, seen: Seen, work: Path) -> Written:
    """Score, write one shard and read it back."""
    stage = AdvantagesStage.model_validate(
        {
            "stage": "advantages",
            "input": "responses",
            "model": "aligned",
            "reference": "reference",
            "beta": 1.0,
            "support": SUPPORTS[name],
            "seed": seed,
        }
    )
    blocks = LogitBlocks(seen.heads[0]), LogitBlocks(seen.heads[1])
    rows, start = [], 0
    for row in seen.rows:
        at = slice(start, start + len(row.response_ids_A))
        hidden = seen.teachers_PD[0][at], seen.teachers_PD[1][at]
        prompted = Prompted(row.sample_id, row.prompt_ids_T, [row.response_ids_A])
        made = score_row(stage, blocks, Asked(row, prompted, hidden))
        assert not isinstance(made, Rejected), made.reason
        rows.append(made)
        start = at.stop
    width = seen.student_PD.shape[1]
    spec = ModelSpec(work, "float32", "transformers", width)
    models = {"aligned": spec, "reference": spec}
    bound = stage.bind(StageContext(work, seen.heads[0].vocab_size, models))
    file = work / f"{name} {seed}.arrow"
    num_bytes = write_shard(file, bound, rows).num_bytes
    table = read_shard(file)
    read = [row for batch in table.to_batches() for row in stage.table.rows(batch)]
    losses = losses_of(SUPPORTS[name]["kind"], read, seen)
    errors = {loss: GradientError() for loss in losses}
    columns = {
        column: size / seen.num_positions
        for column, size in bytes_by_column(file, stage.table.zstd_level).items()
    }
    return Written(name, num_bytes / seen.num_positions, columns, losses, errors)


def losses_of(kind: str, rows: Sequence[Any], seen: Seen) -> dict[str, Support]:
    """Return the product's loss on rows of a table; on the published support, clipped and not."""

    if kind == "exact":
        names = "teacher_hidden_PD", "reference_hidden_PR"
        hidden = [np.concatenate([getattr(row, name) for row in rows]) for name in names]
        states = torch.from_numpy(hidden[0]), torch.from_numpy(hidden[1])
        return {"": ExactSupport(*states, seen.heads, 1.0)}
    found = [advantage_values(asdict(row)) for row in rows]
    width = max(ids_PK.shape[1] for ids_PK, _, _ in found)
    ids_PK, values_PK = (
        np.concatenate([np.pad(part[i], ((0, 0), (0, width - part[i].shape[1]))) for part in found])
        for i in (0, 1)
    )
    rest_P = np.concatenate([rest_P for _, _, rest_P in found])
    if kind == "as_released":
        return {
            ", clipped": _sparse(ids_PK, values_PK.clip(*CLIP), rest_P),
            ", unclipped": _sparse(ids_PK, values_PK, rest_P),
        }
    return {"": _sparse(ids_PK, values_PK, rest_P)}


def _sparse(ids_PK: Any, values_PK: Any, rest_P: Any) -> SparseSupport:
    return SparseSupport(*(torch.from_numpy(part) for part in (ids_PK, values_PK, rest_P)))


@dataclass
class Positions:
    """What is true of all positions, whatever is kept of them; means over positions.

    ``size`` is of |A| where the student looks, ``known`` the student's mass that its responses
    carry; ``expected`` the expected square of a draw's error by support, summed over positions.
    """

    size: float = 0.0
    known: float = 0.0
    gradient_square: float = 0.0
    gradient_V: Tensor = field(default_factory=lambda: torch.zeros(()))
    expected: dict[str, float] = field(default_factory=dict)

    def expected_errors(self, name: str) -> tuple[float | None, float | None]:
        """Return the expected relative error of the sum and of positions, where a draw has one."""
        if name not in self.expected:
            return None, None
        squares = float(self.gradient_V.double().square().sum()), self.gradient_square
        of_sum, of_positions = (math.sqrt(self.expected[name] / square) for square in squares)
        return of_sum, of_positions


def measure(tables: Sequence[Written], seen: Seen) -> Positions:
    """Fill in all errors."""
    torch.set_flush_denormal(True)  # squares of tiny shares, which a CPU is slow on
    truth, found = ExactSupport(*seen.teachers_PD, seen.heads, 1.0), Positions()
    for start in range(0, seen.num_positions, CHUNK):
        at = slice(start, min(start + CHUNK, seen.num_positions))
        logprobs_CV = seen.student_logprobs(at)
        gradient_CV = _gradient(truth, logprobs_CV, at)
        for table in tables:
            for name, loss in table.losses.items():
                error_CV = _gradient(loss, logprobs_CV, at).sub_(gradient_CV)
                table.errors[name].add(error_CV, gradient_CV)
        found.gradient_square += float(gradient_CV.double().square().sum())
        found.gradient_V = found.gradient_V + gradient_CV.sum(0)
        _look_at(found, seen, at, logprobs_CV)
    return found


def _look_at(found: Positions, seen: Seen, at: slice, logprobs_CV: Tensor) -> None:
    probs_CV = logprobs_CV.exp()
    teacher_CV, reference_CV = (
        head.logits(hidden_PD[at]).log_softmax(1)
        for head, hidden_PD in zip(seen.heads, seen.teachers_PD, strict=True)
    )
    size_C = (probs_CV * (teacher_CV - reference_CV).abs()).sum(1)
    found.size += float(size_C.sum()) / seen.num_positions
    top = logprobs_CV.topk(TOP, dim=1)
    found.known += float(top.values.exp().sum()) / seen.num_positions
    scored = Scored(teacher_CV, reference_CV, torch.zeros(len(size_C), dtype=torch.long), 1.0)
    student = StudentTop(top.indices, top.values.half().float())
    for name, support in SUPPORTS.items():
        if support["kind"] == "threshold":
            settings = ThresholdSupport.model_validate(support)
            square = expected_square(settings, scored, student, probs_CV)
            found.expected[name] = found.expected.get(name, 0.0) + square


def _gradient(loss: Support, logprobs_CV: Tensor, at: slice) -> Tensor:
    """Return minus the gradient of the expected advantage [C, V], as the trainer makes it."""
    result_CV = logprobs_CV.clone()
    loss.expected_(result_CV, at, with_grad=True)
    return result_CV


def results(tables: Sequence[Written], found: Positions) -> list[dict[str, Any]]:
    """Return a row for each support and loss, draws taken together."""
    rows = []
    for name in SUPPORTS:
        of_name = [table for table in tables if table.name == name]
        expected = found.expected_errors(name)
        for loss in of_name[0].losses:
            errors = [table.errors[loss] for table in of_name]
            rows.append(
                {
                    "support": name + loss,
                    "B/position": float(np.mean([t.bytes_per_position for t in of_name])),
                    "as published": PUBLISHED_BYTES if name == RELEASED else None,
                    "mean gradient": _rms([e.total.relative_error for e in errors]),
                    "expected": expected[0],
                    "cosine": float(np.mean([e.total.cosine for e in errors])),
                    "position": _rms([e.positions.relative_error for e in errors]),
                    "expected of it": expected[1],
                }
            )
    return rows


def columns(tables: Sequence[Written], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each column of these supports: its bytes a position after compression."""
    return [
        {"support": name, "column": column, "B/position": size}
        for name in names
        for column, size in next(table for table in tables if table.name == name).columns.items()
    ]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(float(np.mean(np.square(values))))


def judge(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    found = {row["support"]: row for row in rows}
    ours, released = found[BARRED], found[f"{RELEASED}, clipped"]
    default, ratio = found[DEFAULT], ours["mean gradient"] / released["mean gradient"]
    return [
        at_most(f"{BARRED}: B/position of both teachers", ours["B/position"], MAX_BYTES),
        at_most(f"{BARRED}: mean gradient's error, released = 1", ratio, 1.0),
        at_most(f"{DEFAULT}: B/position of both teachers", default["B/position"], MAX_TAU_BYTES),
        *(
            at_most(f"{DEFAULT}: {said}, k = 16 = 1", default[name] / ours[name], 1.0)
            for name, said in MEASURES.items()
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
