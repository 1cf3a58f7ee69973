"""Do BiAlign and In-context Learning Distillation beat their baselines where students can learn?

A teacher learns to read in context what labels stand for: classes, relations and orders of words.
Small students begin with a short training of their own, and each method goes on from there, one
recipe a seed (``in_context.recipes``). What is compared is whether each held-out episode is
answered, student against student on the same seed and episode. Learning rates are searched
beforehand, alike for all methods (``in_context.search``). MEND's distillers are judged beside what
their reader, the teacher, answers without them. Everything stays in ``CACHE/benchmarks/icl``; a run
that was killed goes on from there.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bars import Bar, at_least, at_most, benchmark_parser, finish
from benchmarks.methods.in_context.answers import TEACHER, read_overall, rows_of, tasks_of
from benchmarks.methods.in_context.claims import JUDGED, ON_NOVEL, effects
from benchmarks.methods.in_context.methods import (
    MEND,
    METHODS,
    RATES,
    START,
    TIE_TOLERANCE,
    WRONG,
    Settings,
)
from benchmarks.methods.in_context.page import write_docs
from benchmarks.methods.in_context.recipes import (
    write_cached_recipe,
    write_first_recipes,
    write_labels_recipe,
    write_mend_recipe,
    write_recipe,
    write_world,
)
from benchmarks.methods.in_context.search import NEAR, Searched, best_rate, search_rates
from benchmarks.methods.in_context.steps import LM_BATCH, tuning_tasks
from benchmarks.methods.in_context.world import (
    FIRST,
    KINDS,
    KNOWN,
    LABELS_A_TASK,
    NOVEL,
    READ,
    Shape,
)
from benchmarks.recipe_run import run_recipe_file, two_processes
from benchmarks.rewarded_grammar.files import num_parameters
from pipeline.planning.plan import PlannedStep
from schemas.dataset import open_dataset
from schemas.storage.manifest import read_manifest
from stages.student.batches.episodes import subsets_of

BY_KIND = {f"{JUDGED}_{kind}": kind for kind in KINDS}
MOST_HALF_WIDTH = 0.015  # of a difference of accuracies
LEAST_TEACHER = 0.9

FULL = Settings(
    teacher=Shape(width=128, layers=3, heads=8, intermediate=384),
    teacher_first_steps=4000,
    teacher_steps=1500,
    teacher_whole_steps=200,
    student=Shape(width=64, layers=3, heads=4, intermediate=128),
    start_steps=4500,
    start_whole_steps=100,
    steps=200,
    batch=16,
    train_tasks=28,
    train_examples=22,
    judged_tasks=28,
    novel_tasks=10,
    judged_queries=28,
    seeds=tuple(range(8)),
    distiller_steps=(300, 500),
)
QUICK = Settings(
    teacher=Shape(width=32, layers=2, heads=4, intermediate=64),
    teacher_first_steps=10,
    teacher_steps=20,
    teacher_whole_steps=10,
    student=Shape(width=32, layers=2, heads=4, intermediate=64),
    start_steps=10,
    start_whole_steps=5,
    steps=3,
    batch=4,
    train_tasks=2,
    train_examples=20,
    judged_tasks=2,
    novel_tasks=1,
    judged_queries=5,
    seeds=(0, 1),
    distiller_steps=(3, 3),
)

Array = npt.NDArray[Any]
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write evidence_icl.md and its figure there")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    started = time.monotonic()
    folder = options.cache.absolute() / "benchmarks" / ("icl-quick" if options.quick else "icl")
    with two_processes() as pool:
        results = measured(pool, folder, settings, search=not options.quick)
    results["minutes"] = round((time.monotonic() - started) / 60, 1)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    bars = [] if options.quick else judge(results)
    status = finish(bars, results["rows"], options.json)
    if options.docs:
        write_docs(options.docs, results, quick=options.quick)
    return status


def measured(pool: Executor, folder: Path, settings: Settings, *, search: bool) -> dict[str, Any]:
    """Run every recipe, two at a time, and return the numbers of the page."""
    write_world(folder, settings)
    run_recipe_file(write_labels_recipe(folder, settings))
    list(pool.map(run_recipe_file, write_first_recipes(folder, settings)))
    for asked in ("tuning", "judged") if search else ("judged",):  # what two recipes share, once
        run_recipe_file(write_cached_recipe(folder, settings, asked))
    searched: Searched = {}
    rates = dict.fromkeys(METHODS, RATES[0])
    if search:
        searched = search_rates(pool, folder, settings)
        rates = {name: best_rate(name, searched) for name in METHODS}
    recipes = [write_recipe(folder, settings, seed, rates) for seed in settings.seeds]
    of_reader, *of_seeds = pool.map(
        run_recipe_file, [write_mend_recipe(folder, settings), *recipes]
    )
    found: dict[str, dict[str, list[Array]]] = {tasks: {} for tasks in (JUDGED, ON_NOVEL, *BY_KIND)}
    gold: dict[str, list[float]] = {}
    of_subsets: dict[str, list[float]] = {}
    for steps in of_seeds:
        for tasks, by_student in found.items():
            for name, right_E in rows_of(steps["results"], tasks).items():
                by_student.setdefault(name, []).append(right_E)
        for name, gold_E in rows_of(steps["results"], JUDGED, "gold_logprob").items():
            gold.setdefault(name, []).append(float(gold_E.mean()))
        for name, numbers in read_overall(steps["subset_results"]).items():
            of_subsets.setdefault(name, []).append(numbers["subset_rank_correlation"])
    for tasks, by_student in found.items():
        by_student |= by_distiller(rows_of(of_reader["results"], tasks), len(settings.seeds))
    right = {
        tasks: {name: np.array(seeds) for name, seeds in by_student.items()}
        for tasks, by_student in found.items()
    }
    return {
        "world": described(settings, steps, right),
        "rates": rates,
        "search": searched,
        "tokens": tokens_a_step(settings, steps),
        "accuracy": {
            name: {BY_KIND.get(tasks, tasks): float(right[tasks][name].mean()) for tasks in right}
            for name in right[JUDGED]
        },
        "gold_logprob": {name: float(np.mean(values)) for name, values in gold.items()},
        "subset_correlation": {name: float(np.mean(taus)) for name, taus in of_subsets.items()},
        "chance": 1 / LABELS_A_TASK,
        "rows": effects(right, tasks_of(steps["results"], JUDGED)),
    }


def by_distiller(right: Mapping[str, Array], num_seeds: int) -> dict[str, list[Array]]:
    """Return the distillers of all seeds as one, and beside each what stands beside all."""
    seeds = [f"{MEND}_{seed}" for seed in range(num_seeds)]
    beside = {name: [right_E] * num_seeds for name, right_E in right.items() if name not in seeds}
    return {MEND: [right[name] for name in seeds], **beside}


def tokens_a_step(settings: Settings, steps: Mapping[str, PlannedStep]) -> dict[str, float]:
    """Return the tokens that each method's student reads in a step, on average.

    That is an episode, for BiAlign with each of its subsets, with the LM term a row of text.
    """
    episodes = {rows: _mean_tokens(steps[rows]) for rows in ("episodes", "noisy", "multi")}
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
        tokens += float(of_subsets) if method.objective["loss"] == "bialign" else 0.0
        tokens += _mean_tokens(steps["text"]) if method.lm_data else 0.0
        found[name] = tokens * settings.batch
    return found


def _mean_tokens(step: PlannedStep) -> float:
    manifest = read_manifest(step.folder)
    return manifest.num_tokens / manifest.num_rows


def described(
    settings: Settings,
    steps: Mapping[str, PlannedStep],
    right: Mapping[str, Mapping[str, Array]],
) -> dict[str, Any]:
    """Return what the page says of the world and of its models."""
    teacher_steps = (
        settings.teacher_first_steps + settings.teacher_steps + settings.teacher_whole_steps
    )
    train = open_dataset([steps["episodes"].folder], split="train")
    multi = open_dataset([steps["multi"].folder], split="train")
    return {
        "classes": len(KNOWN),
        "first_classes": len(FIRST),
        "novel_classes": len(NOVEL),
        "new": len(set(KNOWN) - set(READ)),
        "wrong": WRONG,
        "tie": TIE_TOLERANCE,
        "labels": LABELS_A_TASK,
        "teacher_size": num_parameters(steps["teacher_trained"].folder) / 1e6,
        "student_size": num_parameters(steps[START].folder) / 1e6,
        "corpus": LM_BATCH * teacher_steps,
        "start_steps": settings.start_steps + settings.start_whole_steps,
        "steps": settings.steps,
        "batch": settings.batch,
        "train": len(train),
        "tasks": len(KINDS) * settings.train_tasks,
        "multi": len(multi),
        **{f"{tasks}_episodes": right[tasks][START].shape[1] for tasks in (JUDGED, ON_NOVEL)},
        "judged": len(KINDS) * settings.judged_tasks,
        "novel": len(KINDS) * settings.novel_tasks,
        "shown": settings.shown,
        "vectors": settings.num_vectors,
        "distiller_steps": " and ".join(map(str, settings.distiller_steps)),
        "tuning": len(KINDS) * tuning_tasks(settings),
        "seeds": len(settings.seeds),
        "rates": " and ".join(f"{rate:g}" for rate in RATES),
        "near": NEAR,
    }


def judge(results: Mapping[str, Any]) -> list[Bar]:
    """The bars: a strong teacher, and intervals that can tell."""
    widest = max((row["high"] - row["low"]) / 2 for row in results["rows"])
    return [
        at_least("accuracy of the teacher", results["accuracy"][TEACHER][JUDGED], LEAST_TEACHER),
        at_most("widest half of an interval", widest, MOST_HALF_WIDTH),
    ]


if __name__ == "__main__":
    sys.exit(main())
