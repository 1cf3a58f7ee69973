"""Recipes of the in-context experiments: one a seed, on one root, so what is shared is made once.

Each is an ordinary file: ``teachercache run seed_0.yaml`` makes that seed's rows again. A seed is
the order of a method's rows; teacher, student's start, tasks, episodes and signals are the same for
all seeds, as papers distil one teacher into one student, and one cache serves many of these.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from benchmarks.methods.in_context.methods import MEND, METHODS, START, WRONG, Settings, step_name
from benchmarks.methods.in_context.steps import (
    LM_BATCH,
    Step,
    cached_steps,
    episodes_step,
    labels_step,
    results_step,
    signal_step,
    start_steps,
    steps_before,
    teacher_steps,
    training_step,
    tuning_tasks,
)
from benchmarks.methods.in_context.world import (
    ALL,
    FIRST,
    NOVEL,
    READ,
    TOKENS,
    World,
    save_model,
    write_corpus,
)
from benchmarks.rewarded_grammar.files import write_jsonl


def write_world(folder: Path, settings: Settings) -> None:
    """Write tasks, texts and random models; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "written"
    if written.exists():
        return
    world = World(seed=0)
    tasks = {
        "judged": world.new_tasks(settings.judged_tasks),
        "novel": world.new_tasks(settings.novel_tasks, NOVEL),
        "tuning": world.new_tasks(tuning_tasks(settings)),
        "train": world.new_tasks(settings.train_tasks),
    }
    asked = settings.support + settings.judged_queries
    for name, found in tasks.items():
        examples = settings.train_examples if name == "train" else asked
        rows = world.task_rows(found, name, examples)
        write_jsonl(folder / f"{name}.jsonl", rows)
        if name == "train":
            write_jsonl(folder / "noisy.jsonl", world.with_wrong_answers(rows, WRONG))
    length = settings.teacher_examples * TOKENS
    for name, steps, classes, read in (
        ("corpus", settings.teacher_steps, ALL, ALL),
        ("whole", settings.teacher_whole_steps, ALL, ALL),
        ("start", max(settings.teacher_first_steps, settings.start_steps), FIRST, READ),
    ):
        corpus = world.corpus(max(800, steps * LM_BATCH), length, classes, read)
        write_corpus(folder / f"{name}.parquet", corpus)
    texts = ({"text": text} for text in world.sentences(1000, length))
    write_jsonl(folder / "text.jsonl", texts)
    save_model(folder / "teacher", settings.teacher, seed=0)
    save_model(folder / "student", settings.student, seed=1000)
    written.write_text("")


def write_labels_recipe(folder: Path, settings: Settings) -> Path:
    """Write ``labels.yaml``: the rows that teacher and students begin with."""
    return _written(folder, "labels", {"labels": labels_step(folder, settings)})


def write_first_recipes(folder: Path, settings: Settings) -> list[Path]:
    """Write ``teacher.yaml`` and ``start.yaml``: what all else begins from."""
    return [
        _written(folder, "teacher", teacher_steps(folder, settings)),
        _written(folder, "start", start_steps(folder, settings)),
    ]


def write_cached_recipe(folder: Path, settings: Settings, asked: str) -> Path:
    """Write ``cached_<asked>.yaml``: what the teacher says, for all seeds."""
    steps = teacher_steps(folder, settings) | cached_steps(folder, settings, asked)
    return _written(folder, f"cached_{asked}", steps)


def write_recipe(folder: Path, settings: Settings, seed: int, rates: Mapping[str, float]) -> Path:
    """Write ``seed_<seed>.yaml``: each method at its rate, judged."""
    trained = {
        name: training_step(METHODS[name], settings, seed, rate) for name, rate in rates.items()
    }
    steps = {
        **steps_before(folder, settings, "judged"),
        **trained,
        "results": results_step([START, *trained], ["judged", "judged_candidates"]),
        "subset_results": results_step([START, *_SHARE_SUBSETS], ["tuning", "tuning_preferences"]),
    }
    return _written(folder, f"seed_{seed}", steps)


def write_search_recipe(
    folder: Path, settings: Settings, seed: int, rates: Mapping[str, Sequence[float]], name: str
) -> Path:
    """Write ``<name>.yaml``: methods at each of their rates, judged on tasks of their own."""
    trained = {
        step_name(method, rate): training_step(METHODS[method], settings, seed, rate)
        for method, tried in rates.items()
        for rate in tried
    }
    steps = {
        **steps_before(folder, settings, "tuning"),
        **trained,
        "results": results_step([START, *trained], ["tuning", "tuning_candidates"]),
    }
    return _written(folder, name, steps)


def write_mend_recipe(folder: Path, settings: Settings) -> Path:
    """Write ``mend.yaml``: a distiller a seed, judged beside text, nothing and everything."""
    steps = teacher_steps(folder, settings) | {
        "shown": {"stage": "demonstrations", "input": "whole"},
        "episodes": episodes_step(settings, "train", folder),
        "judged": episodes_step(settings, "judged", folder),
        "shown_signals": signal_step("teacher_logits", "shown"),
    }
    for rows in ("episodes", "judged"):
        steps[f"{rows}_asked"] = {"stage": "demonstrations", "input": rows}
        steps[f"{rows}_asked_signals"] = signal_step("teacher_logits", f"{rows}_asked")
    for seed in settings.seeds:
        steps[f"distiller_{seed}"] = {
            "stage": "distiller_init",
            "model": "teacher",
            "reader": "teacher",
            "num_vectors": settings.num_vectors,
            "seed": seed,
        }
        stages = {
            f"mend_1_{seed}": (f"distiller_{seed}", "shown", {"loss": "mend", "answer_weight": 0}),
            f"{MEND}_{seed}": (f"mend_1_{seed}", "episodes_asked", {"loss": "mend"}),
        }
        for number, (name, (student, rows, objective)) in enumerate(stages.items()):
            steps[name] = {
                "stage": "train",
                "student": student,
                "reader": "teacher",
                "data": [rows, f"{rows}_signals"],
                "objective": objective,
                "max_steps": settings.distiller_steps[number],
                "per_device_batch_size": settings.batch,
                "lr": 1e-3,
                "seed": seed,
            }
    distillers = [f"{MEND}_{seed}" for seed in settings.seeds]
    steps["results"] = results_step(distillers, ["judged_asked", "judged_asked_signals"])
    steps["results"]["reader"] = "teacher"
    return _written(folder, "mend", steps)


def _written(folder: Path, name: str, steps: Mapping[str, Step]) -> Path:
    blank = {f"blank_{model}": {"path": str(folder / model), **_HELD} for model in _BLANK}
    body = {
        "name": f"icl-{name}",
        "models": {"teacher": {"step": "teacher_trained", **_HELD}, **blank},
        "steps": dict(steps),
        "execution": {"root": str(folder / "cache"), "engine": {"device": "cpu"}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


_BLANK = ("teacher", "student")
_HELD = {"dtype": "float32", "engine": "transformers"}
_SHARE_SUBSETS = tuple(name for name, method in METHODS.items() if method.rows == "episodes")
