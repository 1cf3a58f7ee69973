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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from benchmarks.bars import Bar, at_most, benchmark_parser, finish, markdown_table
from benchmarks.storage.signal_error import Comparison
from schemas.sample_id import sample_id_of
from schemas.storage.shards import read_shard, write_shard
from schemas.tables.responses import Responses
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.engines.engine import open_engine
from stages.models.spec import EngineOptions, ModelSpec
from stages.signals.advantages.stage import AdvantagesStage
from stages.signals.advantages.work import Asked, score_row
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.scoring.responses import Prompted
from stages.stage import Rejected, StageContext
from stages.student.losses.advantage import CLIP, ExactSupport, SparseSupport, Support

FULL, QUICK = (40, 96, 3), (6, 48, 1)  # prompts, longest responses, seeds of each threshold
TOP = 16  # likeliest tokens that the student's responses carry
CHUNK = 64
MAX_BYTES = 96.0
PUBLISHED_BYTES = 2 * 816.0
BARRED, RELEASED = "threshold, k = 16", "as_released, k = 50"
SUPPORTS: dict[str, dict[str, Any]] = {
    "threshold, k = 8": {"kind": "threshold", "k": 8},
    BARRED: {"kind": "threshold", "k": 16},
    "threshold, k = 24": {"kind": "threshold", "k": 24},
    "union_top_k, k = 8": {"kind": "union_top_k", "k": 8},
    "union_top_k, k = 16": {"kind": "union_top_k", "k": 16},
    RELEASED: {"kind": "as_released", "k": 50},
    "exact": {"kind": "exact"},
}

PAGE = """# Advantages: bytes a position, and the gradient they buy

Regenerate with `python benchmarks/advantages/advantages.py --docs docs/measured/` (the figures
below come from that run). {positions} response positions to {prompts} real prompts that no model
here was trained on. The aligned teacher is SmolLM2-135M-Instruct after {dpo_steps} steps of DPO on
real pairs, made by the benchmark, as no aligned teacher of this size comes with the assets; the
reference is the model itself. The student is 26 of its 30 layers after {kd_steps} steps of
distillation: far behind its teacher, less sure of itself, and given to repetition. beta is 1. Where
the student looks, an advantage is {mean_advantage:.3f} nats in size on average; its {top} likeliest
tokens, which its responses carry, hold {known:.0%} of its mass.

"mean gradient" is the relative error of ADPA's gradient with respect to the student's logits,
summed over all positions, "cosine" the angle's; "position" the relative error of all positions as
one long vector. Errors of `threshold` are root mean squares over {seeds} draws. Everything is
counted in the bytes: whole shard files over response positions, with the schema (some 3.5 kB a
shard) and the sums.

{bars}

{rows}

- `threshold` has no bias: all of its error is noise, which halves in the mean with four times as
  many positions. Single positions are noisy, by design. It is the support whose error goes to
  nothing in a long run, whatever the student has become by then.
- `union_top_k` gives all tokens that it does not keep one advantage. A position of it is worth far
  more than one of `threshold`, at fewer bytes, and its bias is small; on some thousands of
  positions the two are equal in the mean. Where there is little data it is the better choice.
- `as_released` erases every negative advantage (the published loss clips), which is most of its
  error; without the clipping ("unclipped") what is left is the floor and the missing tokens. Its
  bytes are those of our table; as published a teacher takes 816 B a position, of which two are
  needed.
- `exact` is two float32 hidden states of {width} numbers each; nothing is approximated.

## What decides the noise of `threshold`

Tokens are drawn with probabilities that rise with `m |A|`
(`stages/signals/advantages/supports.py`), m the mean of the three distributions with the student's
unknown rest shared out as the square root of the teachers' mean. An experiment apart (November
2026) computed the expected error of a position's gradient from those probabilities, on 384 such
positions, k = 16:

| drawn by | error |
| --- | --- |
| m, of the student its known tokens alone | 7.1 |
| m, the rest shared out as the teachers' mean | 6.2 |
| m, the rest shared out as its square root | 1.8 |
| the same times abs(A) | 1.2 |
| the same times abs(A - c), with A - c stored, c the mean of A over the unknown rest | 1.05 |
| the student's own distribution times abs(A - c), were it known | 0.34 |

A student that is less sure than its teachers has mass where they have next to none. A token of that
kind is hardly ever drawn by the teachers' opinion, and counts for thousands when it is: sharing the
rest out more evenly is what helps most.

A constant c per position, taken off A before weights are made (the gradient of the whole sum does
not move by it), takes another 15 % off, as much as four more tokens a position. It is left out for
now: the loss needs c again to be the loss, so it would take a column more in the table. With the
student's 64 likeliest tokens in the responses in place of 16, the errors are 0.92 (by m abs(A)) and
0.74 (with c).
"""


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
    size, known = measure(tables, seen)
    rows = results(tables)
    bars = judge(rows)
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
            mean_advantage=size,
            known=known,
            bars=markdown_table(shown),
            rows=markdown_table(rows),
        )
        (options.docs / "advantages.md").write_text(page)
    return finish(bars, rows, options.json)


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
    """A table of one support: bytes a position, and the losses that read it with their errors."""

    name: str
    bytes_per_position: float
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
    return Written(name, num_bytes / seen.num_positions, losses, errors)


def losses_of(kind: str, rows: Sequence[Any], seen: Seen) -> dict[str, Support]:
    """Return the product's loss on rows of a table; on the published support, clipped and not."""

    def joined(name: str) -> Any:
        return np.concatenate([getattr(row, name) for row in rows])

    if kind == "exact":
        teacher_PD, reference_PR = joined("teacher_hidden_PD"), joined("reference_hidden_PR")
        hidden = torch.from_numpy(teacher_PD), torch.from_numpy(reference_PR)
        return {"": ExactSupport(hidden[0], hidden[1], seen.heads, 1.0)}
    rest_P = torch.zeros(seen.num_positions)
    if kind == "union_top_k":
        counts_P, rest = joined("num_entries_P").astype(np.int64), joined("rest_advantages_P")
        filled_PK = np.arange(counts_P.max()) < counts_P[:, None]
        ids_PK, values_PK = (
            np.zeros(filled_PK.shape, np.int64),
            np.zeros(filled_PK.shape, np.float32),
        )
        ids_PK[filled_PK] = joined("token_ids_E")
        values_PK[filled_PK] = joined("advantages_E") - np.repeat(rest, counts_P)
        return {"": _sparse(ids_PK, values_PK, torch.from_numpy(rest.astype(np.float32)))}
    ids_PK, values_PK = joined("token_ids_PK"), joined("advantages_PK").astype(np.float32)
    if kind == "threshold":
        inclusions_PK = np.exp(joined("log_inclusions_PK").astype(np.float32))
        return {"": _sparse(ids_PK, values_PK / inclusions_PK, rest_P)}
    return {
        ", clipped": _sparse(ids_PK, values_PK.clip(*CLIP), rest_P),
        ", unclipped": _sparse(ids_PK, values_PK, rest_P),
    }


def _sparse(ids_PK: Any, values_PK: Any, rest_P: Tensor) -> SparseSupport:
    return SparseSupport(
        torch.from_numpy(ids_PK.astype(np.int64)), torch.from_numpy(values_PK), rest_P
    )


def measure(tables: Sequence[Written], seen: Seen) -> tuple[float, float]:
    """Fill in all errors; return the mean |A| where the student looks, and its known mass."""
    torch.set_flush_denormal(True)  # squares of tiny shares, which a CPU is slow on
    truth = ExactSupport(*seen.teachers_PD, seen.heads, 1.0)
    size = known = 0.0
    for start in range(0, seen.num_positions, CHUNK):
        at = slice(start, min(start + CHUNK, seen.num_positions))
        logprobs_CV = seen.student_logprobs(at)
        gradient_CV = _gradient(truth, logprobs_CV, at)
        for table in tables:
            for name, loss in table.losses.items():
                error_CV = _gradient(loss, logprobs_CV, at).sub_(gradient_CV)
                table.errors[name].add(error_CV, gradient_CV)
        probs_CV = logprobs_CV.exp()
        teacher_CV, reference_CV = (
            head.logits(hidden_PD[at]).log_softmax(1)
            for head, hidden_PD in zip(seen.heads, seen.teachers_PD, strict=True)
        )
        size += float((probs_CV * (teacher_CV - reference_CV).abs()).sum())
        known += float(probs_CV.topk(TOP, dim=1).values.sum())
    return size / seen.num_positions, known / seen.num_positions


def _gradient(loss: Support, logprobs_CV: Tensor, at: slice) -> Tensor:
    """Return minus the gradient of the expected advantage [C, V], as the trainer makes it."""
    result_CV = logprobs_CV.clone()
    loss.expected_(result_CV, at, with_grad=True)
    return result_CV


def results(tables: Sequence[Written]) -> list[dict[str, Any]]:
    """Return a row for each support and loss, draws taken together."""
    rows = []
    for name in SUPPORTS:
        of_name = [table for table in tables if table.name == name]
        for loss in of_name[0].losses:
            errors = [table.errors[loss] for table in of_name]
            rows.append(
                {
                    "support": name + loss,
                    "B/position": float(np.mean([t.bytes_per_position for t in of_name])),
                    "as published": PUBLISHED_BYTES if name == RELEASED else None,
                    "mean gradient": _rms([e.total.relative_error for e in errors]),
                    "cosine": float(np.mean([e.total.cosine for e in errors])),
                    "position": _rms([e.positions.relative_error for e in errors]),
                }
            )
    return rows


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(float(np.mean(np.square(values))))


def judge(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    found = {row["support"]: row for row in rows}
    ours, released = found[BARRED], found[f"{RELEASED}, clipped"]
    ratio = ours["mean gradient"] / released["mean gradient"]
    return [
        at_most(f"{BARRED}: B/position of both teachers", ours["B/position"], MAX_BYTES),
        at_most(f"{BARRED}: mean gradient's error, released = 1", ratio, 1.0),
    ]


if __name__ == "__main__":
    sys.exit(main())
