"""What does on-policy distillation from cached scores cost, beside plain ``kd`` and a live teacher?

A student (layers of SmolLM2-135M) answers real prompts, the teacher scores the tokens; then one
process a variant and round, variants interleaved, over the same tokens in the same order, float32:

- ``kd``: forward KL from a ``threshold`` cache of the teacher at those tokens, the yardstick
- ``opd``: the clipped surrogate from two cached log-probs a token
- ``live``: the same loss, the teacher run at every step

Beside the steps stands what is paid once: the student's answers, and the teacher over them for
either cache, as the shards' own records tell. A ratio is the median over rounds of ratios within a
round.
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
    bars_table,
    benchmark_parser,
    finish,
    markdown_table,
)
from benchmarks.recipe_run import run_recipe
from benchmarks.training.cached_tables import MODEL
from pipeline.planning.plan import PlannedStep
from pipeline.planning.recipe import Recipe
from pipeline.reports.step_times import measured_time
from schemas.storage.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
CHATS = "chats/chats.jsonl"
MIN_SPEED = 0.95  # a step of ``opd`` over one of ``kd``
DATA = {"kd": ("answers", "signals"), "opd": ("own", "scored"), "live": ("own", "scored")}
ONCE = {
    "own": "the student's answers",
    "scored": "the teacher's log-probs of them",
    "signals": "the teacher's distributions there, for kd",
}
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is run; ``warmup`` steps are not measured."""

    rows: int
    max_tokens: int
    layers: int
    batch_size: int
    steps: int
    warmup: int
    rounds: int


FULL = Settings(rows=48, max_tokens=96, layers=10, batch_size=4, steps=10, warmup=2, rounds=3)
QUICK = Settings(rows=16, max_tokens=24, layers=4, batch_size=4, steps=4, warmup=1, rounds=1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write opd.md to this folder")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    plan = prepared(options.cache, settings)
    load = os.getloadavg()[0]
    answers: dict[str, list[Answer]] = {name: [] for name in DATA}
    for number in range(settings.rounds):
        for name in DATA:
            answers[name].append(run_variant(name, settings, plan, options.cache / MODEL))
            seconds = ", ".join(f"{second:.2f}" for second in answers[name][-1]["step_s"])
            print(f"round {number + 1} {name}: {seconds} s", flush=True)
    rows, ratio = summary(answers, settings)
    rows += [once(plan[step], what) for step, what in ONCE.items()]
    speed = "speed of an opd step over a kd step, by CPU time"
    bars = [at_least(speed, round(ratio, 4), MIN_SPEED)]
    status = finish(bars, rows, options.json)
    if options.docs:
        write_docs(options.docs, settings, rows, bars, f"load {load:.1f} at the start")
    return status


def prepared(cache: Path, settings: Settings) -> dict[str, PlannedStep]:
    """Make whatever is not there yet; exits with a readable line where an asset is missing."""
    for needed in (cache / MODEL, cache / CHATS):
        if not needed.exists():
            raise SystemExit(f"{needed} is missing: run `make assets` and `make chats` first")
    teacher = {"path": str(cache / MODEL), "dtype": "float32", "engine": "transformers"}
    writer = {"step": "student", "dtype": "float32", "engine": "transformers"}
    by_teacher = {"model": "teacher"}
    chats = {
        "stage": "conversations",
        "tokenizer": "teacher",
        "source": {"kind": "jsonl", "paths": [str(cache / CHATS)]},
        "turns": "last",
        "max_length": 192,
        "max_rows": settings.rows,
        "heldout_fraction": 0.0,
        "max_rejected_fraction": 1.0,
    }
    answer = {"max_tokens": settings.max_tokens, "temperature": 1.0, "max_rejected_fraction": 0.5}
    steps = {
        "chats": chats,
        "student": {"stage": "student_init", "layers": settings.layers, **by_teacher},
        "own": {"stage": "responses", "input": "chats", "model": "writer", **answer},
        "scored": {
            "stage": "response_logprobs",
            "input": "own",
            "per_token": True,
            **by_teacher,
        },
        "answers": {"stage": "answers", "input": "own", "finish_reasons": ["stop", "length"]},
        "signals": {"stage": "teacher_logits", "input": "answers", **by_teacher},
    }
    recipe = Recipe.model_validate(
        {
            "name": "benchmarks-opd",
            "models": {"teacher": teacher, "writer": writer},
            "steps": steps,
            "execution": {"root": str(cache / "benchmarks")},
        }
    )
    return run_recipe(recipe)


def run_variant(
    name: str, settings: Settings, plan: Mapping[str, PlannedStep], teacher: Path
) -> Answer:
    """Start a process for one variant and return its answer."""
    job = {
        "variant": name,
        "student": str(plan["student"].folder),
        "teacher": str(teacher),
        "data": [str(plan[step].folder) for step in DATA[name]],
        "batch_size": settings.batch_size,
        "steps": settings.steps,
    }
    environment = {"OMP_NUM_THREADS": str(os.cpu_count()), "KMP_BLOCKTIME": "0"} | dict(os.environ)
    environment |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        child = [sys.executable, str(ROOT / "benchmarks/training/opd_steps.py")]
        done = subprocess.run(
            [*child, json.dumps(job), str(answer)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        result: Answer = json.loads(answer.read_text())
    return result


def summary(
    answers: Mapping[str, Sequence[Answer]], settings: Settings
) -> tuple[list[dict[str, Any]], float]:
    """Return a row a variant, and how fast a step of ``opd`` is over one of ``kd``."""
    rows, speeds = [], {}
    for name, found in answers.items():
        per_token = {
            clock: [_per_token(answer, clock, settings.warmup) for answer in found]
            for clock in ("step_s", "step_cpu_s")
        }
        base = [_per_token(answer, "step_cpu_s", settings.warmup) for answer in answers["kd"]]
        ratios = [b / a for a, b in zip(per_token["step_cpu_s"], base, strict=True)]
        speeds[name] = statistics.median(ratios)
        rows.append(
            {
                "what": f"step of {name}",
                "CPU s/1k tokens": round(1000 * statistics.median(per_token["step_cpu_s"]), 3),
                "s/1k tokens": round(1000 * statistics.median(per_token["step_s"]), 3),
                "speed over kd, CPU": round(speeds[name], 3),
                "peak MB": round(statistics.median(answer["peak_mb"] for answer in found)),
                "first loss": round(found[0]["first_loss"], 5),
            }
        )
    return rows, speeds["opd"]


def _per_token(answer: Answer, clock: str, warmup: int) -> float:
    """Return the median over steps of seconds a token, as steps have unlike numbers of them."""
    pairs = zip(answer[clock][warmup:], answer["tokens"][warmup:], strict=True)
    return float(statistics.median(seconds / tokens for seconds, tokens in pairs))


def once(step: PlannedStep, what: str) -> dict[str, Any]:
    """Return what a table cost, by its shards' records."""
    found = measured_time(step.place, read_manifest(step.folder))
    assert found.seconds is not None
    per_token = found.seconds / found.num_positions
    return {"what": f"once: {what}", "s/1k tokens": round(1000 * per_token, 3)}


PAGE = """# On-policy distillation from cached scores

Written by `python benchmarks/training/opd.py --docs docs/measured/` ({when}). Steps of {batch}
responses of at most {tokens} tokens, float32, a student of {layers} layers of SmolLM2-135M, {cpus}
cores, one process a variant.

{table}

{bars}

- A step of `opd` reads two numbers a token; `kd` reads a distribution. `live` runs the teacher over
  the batch at every step: the same loss, for what the scores cost once, again and again.
- "once" is the work on the shards by the transformers engine, without loading the model; it is paid
  for each round of `rounds`, and `kd` on the student's own tokens pays it too.
- "first loss" of `opd` and `live` is the same number but for the engine's last bits.
- The teacher here is a few times the student: a larger one makes `live` dearer, and nothing else.
"""


def write_docs(
    folder: Path, settings: Settings, rows: Sequence[Mapping[str, Any]], bars: Sequence[Bar],
    when: str,
) -> None:  # fmt: skip
    """Write the page."""
    page = PAGE.format(
        when=when,
        batch=settings.batch_size,
        tokens=settings.max_tokens,
        layers=settings.layers,
        cpus=os.cpu_count(),
        table=markdown_table(rows),
        bars=bars_table(bars),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "opd.md").write_text(page)


if __name__ == "__main__":
    sys.exit(main())
