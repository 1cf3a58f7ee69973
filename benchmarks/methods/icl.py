"""Do BiAlign and In-context Learning Distillation beat their baselines where students can learn?

A teacher learns random assignments of labels to latent classes in context; students of a tenth of
it begin with a short training of their own, and each method goes on from there, one recipe a seed
(``icl_recipes``). What is compared is whether each held-out episode is answered, student against
student on the same seed and episode. Learning rates are searched beforehand, the same ones for all
methods, on a seed and on tasks of their own. Everything stays in ``--folder``; a run that was
killed goes on from there.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from safetensors import safe_open

from benchmarks.bars import Bar, at_least, at_most, benchmark_parser, finish
from benchmarks.methods.icl_page import write_docs
from benchmarks.methods.icl_recipes import (
    METHODS,
    RATES,
    START,
    Settings,
    step_name,
    tuning_tasks,
    write_recipe,
    write_world,
)
from benchmarks.methods.icl_world import CLASSES, LABELS_A_TASK
from benchmarks.methods.paired import paired_interval, verdict
from pipeline.planning.plan import PlannedStep, make_plan
from pipeline.planning.recipe_file import load_recipe
from pipeline.reports.progress import ConsoleReporter
from pipeline.steps.run import run_plan
from schemas.dataset import open_dataset
from schemas.storage.manifest import read_manifest
from stages.student.batches.episodes import subsets_of
from stages.student.evaluate.by_row import read_rows

SEARCH_SEED = 100
TEACHER = "teacher"
MOST_HALF_WIDTH = 0.015  # of a difference of accuracies
LEAST_TEACHER = 0.9

FULL = Settings(
    teacher_width=128,
    teacher_layers=2,
    teacher_steps=3000,
    student_width=48,
    student_layers=2,
    start_steps=1000,
    steps=200,
    batch=16,
    train_tasks=60,
    train_examples=25,
    judged_tasks=80,
    judged_queries=30,
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
)
QUICK = Settings(
    teacher_width=128,
    teacher_layers=2,
    teacher_steps=1800,
    student_width=32,
    student_layers=2,
    start_steps=30,
    steps=4,
    batch=8,
    train_tasks=4,
    train_examples=25,
    judged_tasks=8,
    judged_queries=10,
    seeds=(0, 1),
)

Array = npt.NDArray[Any]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """A paper's claim: one student answers more episodes than another."""

    paper: str
    said: str
    method: str
    baseline: str


CLAIMS = (
    Claim("BiAlign", "BiAlign beats fine-tuning", "bialign", "fine_tuned"),
    Claim("BiAlign", "BiAlign beats output alignment", "bialign", "output_align"),
    Claim("BiAlign", "the same at lambda 0.05", "bialign_005", "output_align"),
    Claim("BiAlign", "... at equal compute", "bialign_005", "output_align_long"),
    Claim("ICL-D", "Meta-ICT: ICL-D beats tuning", "distilled", "tuned"),
    Claim("ICL-D", "Meta-ICT: the same with the LM term", "distilled_lm", "tuned_lm"),
    Claim("ICL-D", "Multitask-ICT: ICL-D beats tuning", "multi_distilled", "multi_tuned"),
    Claim("ICL-D", "Multitask-ICT: with the LM term", "multi_distilled_lm", "multi_tuned_lm"),
    Claim("ICL-D", "Multitask-ICT: the LM term helps", "multi_distilled_lm", "multi_distilled"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--folder", type=Path, required=True, help="where everything is made")
    parser.add_argument("--docs", type=Path, help="write evidence_icl.md and its figure there")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    started = time.process_time()
    results = measured(options.folder.expanduser().absolute(), settings, search=not options.quick)
    results["processor_minutes"] = round((time.process_time() - started) / 60, 1)
    (options.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    status = finish(judge(results), results["rows"], options.json)
    if options.docs:
        write_docs(options.docs, results)
    return status


def measured(folder: Path, settings: Settings, *, search: bool) -> dict[str, Any]:
    """Run every recipe and return the numbers of the page."""
    write_world(folder, settings, [SEARCH_SEED, *settings.seeds])
    searched: dict[str, float] = {}
    rates = dict.fromkeys(METHODS, RATES[:1])
    if search:
        steps = run(write_recipe(folder, settings, SEARCH_SEED, dict.fromkeys(METHODS, RATES)))
        overall = read_overall(steps["results"])
        searched = {name: numbers["accuracy"] for name, numbers in overall.items()}
        rates = {name: (best_rate(name, searched),) for name in METHODS}
    columns: dict[str, dict[str, list[Array]]] = {"right": {}, "gold_logprob": {}}
    of_subsets: dict[str, list[float]] = {}
    for seed in settings.seeds:
        steps = run(write_recipe(folder, settings, seed, rates))
        for column, by_student in columns.items():
            for name, values_E in rows_of(steps["results"], column).items():
                by_student.setdefault(name, []).append(values_E)
        for name, numbers in read_overall(steps["subset_results"]).items():
            of_subsets.setdefault(name, []).append(numbers["subset_rank_correlation"])
    right_SE = {name: np.array(found) for name, found in columns["right"].items()}
    return {
        "world": described(settings, steps),
        "rates": {name: found[0] for name, found in rates.items()},
        "search": searched,
        "tokens": tokens_a_step(settings, steps),
        "accuracy": {name: float(found_SE.mean()) for name, found_SE in right_SE.items()},
        "gold_logprob": {
            name: float(np.mean(found)) for name, found in columns["gold_logprob"].items()
        },
        "subset_correlation": {name: float(np.mean(taus)) for name, taus in of_subsets.items()},
        "chance": 1 / LABELS_A_TASK,
        "rows": effects(right_SE),
    }


def run(recipe_file: Path) -> dict[str, PlannedStep]:
    """Run a recipe of the product in this process; return its steps by name."""
    recipe = load_recipe(recipe_file, [])
    plan = make_plan(recipe)
    run_plan(plan, recipe.execution, ConsoleReporter(Console(stderr=True)))
    return {step.name: step for step in plan}


def best_rate(method: str, accuracy: Mapping[str, float]) -> float:
    """Return the rate of the search's best accuracy."""
    return max(RATES, key=lambda rate: accuracy[step_name(method, rate)])


def read_overall(step: PlannedStep) -> dict[str, dict[str, float]]:
    """Return each student's numbers over all tasks."""
    body = json.loads((step.folder / "evaluation.json").read_text())
    return {name: report["overall"] for name, report in body.items()}


def rows_of(step: PlannedStep, column: str) -> dict[str, Array]:
    """Return [E] a student's numbers on each episode, in the order of their ids.

    Of ``right`` there is the teacher's too.
    """
    found: dict[str, dict[str, float]] = {}
    for row in read_rows(step.folder).to_pylist():
        found.setdefault(row["student"], {})[row["sample_id"]] = row[column]
        if column == "right":
            found.setdefault(TEACHER, {})[row["sample_id"]] = row["teacher_right"]
    return {
        name: np.array([by_id[sample] for sample in sorted(by_id)], np.float64)
        for name, by_id in found.items()
    }


def tokens_a_step(settings: Settings, steps: Mapping[str, PlannedStep]) -> dict[str, float]:
    """Return the tokens that each method's student reads in a step, on average.

    That is an episode, for BiAlign with each of its subsets, with the LM term a row of text.
    """
    episodes = {rows: _mean_tokens(steps[rows]) for rows in ("episodes", "multi")}
    subsets = open_dataset([steps["episodes"].folder, steps["episodes_preferences"].folder])
    of_subsets = np.mean(
        [
            sum(len(subset.prompt_T) + 1 for subset in subsets_of(subsets[index]))
            for index in range(len(subsets))
        ]
    )
    found = {}
    for name, method in METHODS.items():
        tokens = episodes[method.rows]
        tokens += float(of_subsets) if "preferences" in method.signals else 0.0
        tokens += _mean_tokens(steps["text"]) if method.lm_data else 0.0
        found[name] = tokens * settings.batch
    return found


def _mean_tokens(step: PlannedStep) -> float:
    manifest = read_manifest(step.folder)
    return manifest.num_tokens / manifest.num_rows


def described(settings: Settings, steps: Mapping[str, PlannedStep]) -> dict[str, Any]:
    """Return what the page says of the world and of its models."""
    train = open_dataset([steps["episodes"].folder])
    multi = open_dataset([steps["multi"].folder])
    judged = open_dataset([steps["judged"].folder], split="heldout")
    return {
        "classes": CLASSES,
        "labels": LABELS_A_TASK,
        "teacher_size": num_parameters(steps["teacher_trained"].folder) / 1e6,
        "student_size": num_parameters(steps[START].folder) / 1e6,
        "corpus": read_manifest(steps["corpus"].folder).num_rows,
        "start_steps": settings.start_steps,
        "steps": settings.steps,
        "batch": settings.batch,
        "train": len(train),
        "tasks": settings.train_tasks,
        "multi": len(multi),
        "episodes": len(judged),
        "judged": settings.judged_tasks,
        "tuning": tuning_tasks(settings),
        "seeds": len(settings.seeds),
        "rates": ", ".join(f"{rate:g}" for rate in RATES),
    }


def num_parameters(folder: Path) -> int:
    """Return the number of weights in a model folder."""
    with safe_open(folder / "model.safetensors", framework="np") as weights:
        names = list(weights.keys())
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


def effects(right_SE: Mapping[str, Array]) -> list[Row]:
    """Return a row a claim: the paired difference of accuracies, its interval and the verdict."""
    rows = []
    for claim in CLAIMS:
        interval = paired_interval(right_SE[claim.method] - right_SE[claim.baseline])
        rows.append(
            {
                "paper": claim.paper,
                "claim": claim.said,
                "method": float(right_SE[claim.method].mean()),
                "baseline": float(right_SE[claim.baseline].mean()),
                "effect": interval[0],
                "low": interval[1],
                "high": interval[2],
                "verdict": verdict(interval[1], interval[2]),
            }
        )
    return rows


def judge(results: Mapping[str, Any]) -> list[Bar]:
    """The bars: a strong teacher, and intervals that can tell."""
    widest = max((row["high"] - row["low"]) / 2 for row in results["rows"])
    return [
        at_least("accuracy of the teacher", results["accuracy"][TEACHER], LEAST_TEACHER),
        at_most("widest half of an interval", widest, MOST_HALF_WIDTH),
    ]


if __name__ == "__main__":
    sys.exit(main())
