"""Recipes of the in-context experiments: one a seed, on one root, so what is shared is made once.

Each is an ordinary file: ``teachercache run seed_0.yaml`` makes that seed's rows again. A
seed is a student's random weights, the order of its start's training and of each method's; teacher,
tasks, episodes and signals are the same for all seeds, as one cache serves many students.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.methods.in_context.methods import (
    MEND,
    METHODS,
    START,
    Method,
    Settings,
    step_name,
)
from benchmarks.methods.in_context.world import (
    ALL,
    FIRST,
    NOVEL,
    TOKENS,
    World,
    save_model,
    write_corpus,
)
from benchmarks.rewarded_grammar.files import write_jsonl

Step = dict[str, Any]
LM_BATCH = 16  # rows of a step of language modelling
TEMPLATE = {"demonstration": "{input} {output}", "separator": " ; "}


def tuning_tasks(settings: Settings) -> int:
    """Return the number of tasks that learning rates are searched on."""
    return max(2, settings.judged_tasks // 4)


def write_world(folder: Path, settings: Settings, seeds: Sequence[int]) -> None:
    """Write tasks, texts and random models, a student's for each seed; what is there stays."""
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
        write_jsonl(folder / f"{name}.jsonl", world.task_rows(found, name, examples))
    length = settings.teacher_examples * TOKENS
    for name, steps, classes in (
        ("corpus", settings.teacher_steps, ALL),
        ("whole", settings.teacher_whole_steps, ALL),
        ("start", settings.start_steps, FIRST),
    ):
        rows = world.corpus(max(800, steps * LM_BATCH), length, classes)
        write_corpus(folder / f"{name}.parquet", rows)
    texts = ({"text": text} for text in world.sentences(1000, length))
    write_jsonl(folder / "text.jsonl", texts)
    save_model(
        folder / "teacher", width=settings.teacher_width, layers=settings.teacher_layers, seed=0
    )
    for seed in seeds:
        save_model(
            folder / f"student_{seed}",
            width=settings.student_width,
            layers=settings.student_layers,
            seed=1000 + seed,
        )
    written.write_text("")


def write_recipe(
    folder: Path,
    settings: Settings,
    seed: int,
    rates: Mapping[str, Sequence[float]],
    *,
    search: bool = False,
) -> Path:
    """Write ``seed_<seed>.yaml``: each of ``METHODS`` at each of its rates, judged.

    A ``search`` is judged on tasks that nothing else is.
    """
    asked = "tuning" if search else "judged"
    trained: dict[str, Step] = {}
    for name, method in METHODS.items():
        for rate in rates[name]:
            trained[step_name(name, rate) if search else name] = _training(
                method, settings, seed, rate
            )
    steps = {
        **_teacher_steps(folder, settings),
        **_start_steps(folder, settings, seed),
        **_cached_steps(folder, settings, asked),
        **trained,
        "results": _results([START, *trained], [asked, f"{asked}_candidates"]),
    }
    if not search:
        subset_steps = ("tuning", "tuning_preferences")
        steps["subset_results"] = _results([START, *_SHARE_SUBSETS], list(subset_steps))
    name = f"{'search' if search else 'seed'}_{seed}"
    return _written(folder, name, {"blank_student": folder / f"student_{seed}"}, steps)


def write_mend_recipe(folder: Path, settings: Settings) -> Path:
    """Write ``mend.yaml``: a distiller a seed, judged beside text, nothing and everything."""
    steps = _teacher_steps(folder, settings) | {
        "shown": {"stage": "demonstrations", "input": "whole"},
        "episodes": _episodes(settings, "train", folder),
        "judged": _episodes(settings, "judged", folder),
        "shown_signals": _signal("teacher_logits", "shown"),
    }
    for rows in ("episodes", "judged"):
        steps[f"{rows}_asked"] = {"stage": "demonstrations", "input": rows}
        steps[f"{rows}_asked_signals"] = _signal("teacher_logits", f"{rows}_asked")
    for seed in settings.distiller_seeds:
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
    distillers = [f"{MEND}_{seed}" for seed in settings.distiller_seeds]
    steps["results"] = _results(distillers, ["judged_asked", "judged_asked_signals"])
    steps["results"]["reader"] = "teacher"
    return _written(folder, "mend", {}, steps)


def _written(
    folder: Path, name: str, students: Mapping[str, Path], steps: Mapping[str, Step]
) -> Path:
    models = {"blank_teacher": folder / "teacher", **students}
    body = {
        "name": f"icl-{name}",
        "models": {"teacher": {"step": "teacher_trained", **_HELD}}
        | {model: {"path": str(path), **_HELD} for model, path in models.items()},
        "steps": dict(steps),
        "execution": {"root": str(folder / "cache"), "engine": {"device": "cpu"}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


_HELD = {"dtype": "float32", "engine": "transformers"}
_SHARE_SUBSETS = tuple(name for name, method in METHODS.items() if not method.multitask)


def _teacher_steps(folder: Path, settings: Settings) -> dict[str, Step]:
    """The teacher, trained from nothing: what labels follow from, of few classes, of all, the rest.

    A model that has found in few classes how a label is looked up learns more of them soon.
    """
    return {
        "labels": _corpus(folder, settings, "start", labels_alone=True),
        "corpus": _corpus(folder, settings, "corpus", labels_alone=True),
        "whole": _corpus(folder, settings, "whole"),
        "teacher_first": {
            **_language_model("blank_teacher", "labels", settings.start_steps, lr=2e-3),
            "scheduler": "constant_with_warmup",
        },
        "teacher_labels": _language_model(
            "teacher_first", "corpus", settings.teacher_steps, lr=2e-3
        ),
        "teacher_trained": _language_model(
            "teacher_labels", "whole", settings.teacher_whole_steps, lr=3e-4
        ),
    }


def _start_steps(folder: Path, settings: Settings, seed: int) -> dict[str, Step]:
    """The student's start: a short training of the same two kinds, on the first classes alone."""
    trained = {
        "base": _language_model("blank_student", "labels", settings.start_steps, lr=4e-3),
        START: _language_model("base", "start_whole", settings.start_whole_steps, lr=1e-3),
    }
    return {
        "start_whole": _corpus(folder, settings, "start"),
        **{name: {**step, "seed": seed} for name, step in trained.items()},
    }


def _corpus(folder: Path, settings: Settings, name: str, *, labels_alone: bool = False) -> Step:
    source = {"kind": "parquet", "paths": [str(folder / f"{name}.parquet")]}
    return {
        "stage": "token_files",
        "source": source | ({"mask": "learned"} if labels_alone else {}),
        "tokenizer": "blank_teacher",
        "length": settings.teacher_examples * TOKENS,
        "heldout_fraction": 0.01,
    }


def _language_model(student: str, data: str, steps: int, *, lr: float) -> Step:
    return {
        "stage": "train",
        "student": student,
        "data": [data],
        "objective": {"loss": "cross_entropy"},
        "max_steps": steps,
        "per_device_batch_size": LM_BATCH,
        "lr": lr,
    }


def _cached_steps(folder: Path, settings: Settings, asked: str) -> dict[str, Step]:
    """Episodes and running text, and what the teacher says of them, once for all seeds.

    Multitask-ICT trains on examples of the tasks that are ``asked``.
    """
    steps: dict[str, Step] = {
        "text": _text(folder, settings),
        "text_logits": _signal("teacher_logits", "text"),
        "episodes": _episodes(settings, "train", folder),
        "multi": _episodes(settings, asked, folder, multitask=True),
        **{name: _episodes(settings, name, folder) for name in dict.fromkeys((asked, "tuning"))},
    }
    for rows in ("episodes", "multi", asked):
        steps[f"{rows}_candidates"] = _signal("candidate_scores", rows)
    for rows in ("episodes", "tuning"):
        steps[f"{rows}_preferences"] = _signal("subset_preferences", rows)
    steps["episodes_logits"] = _signal("teacher_logits", "episodes")
    return steps


def _text(folder: Path, settings: Settings) -> Step:
    return {
        "stage": "ingest",
        "source": {"kind": "jsonl", "paths": [str(folder / "text.jsonl")]},
        "tokenizer": "blank_teacher",
        "length": settings.teacher_examples * TOKENS,
        "mode": "truncate",
        "heldout_fraction": 0.01,
    }


def _episodes(settings: Settings, tasks: str, folder: Path, *, multitask: bool = False) -> Step:
    """Training episodes of ``train``; of other tasks those that ask, or train, multitask.

    Training steps measure a query of each held-out task before and after. ``judged`` asks tasks of
    novel classes too.
    """
    trains = tasks == "train" or multitask
    held_out = "tuning" if tasks == "train" else tasks
    counts = {held_out: len_of(settings, held_out)}
    if tasks == "judged" and not multitask:
        counts["novel"] = settings.novel_tasks
    files = dict.fromkeys((tasks, *counts))
    return {
        "stage": "episodes",
        "tokenizer": "blank_teacher",
        "sources": [{"kind": "metaicl", "paths": [str(folder / f"{f}.jsonl") for f in files]}],
        "targets": [
            f"{name}_{number}" for name, count in counts.items() for number in range(count)
        ],
        "paradigm": "multitask" if multitask else "meta",
        "demonstrations": {"min": 4, "max": settings.shown} if trains else settings.shown,
        "draw": "resample",
        "support": settings.support,
        **({"queries_per_task": 1} if trains else {}),
        "template": TEMPLATE,
        "max_length": settings.teacher_examples * TOKENS,
    }


def len_of(settings: Settings, tasks: str) -> int:
    """Return how many tasks are ``judged`` or ``tuning``."""
    return settings.judged_tasks if tasks == "judged" else tuning_tasks(settings)


def _signal(stage: str, rows: str) -> Step:
    return {"stage": stage, "input": rows, "model": "teacher"}


def _training(method: Method, settings: Settings, seed: int, rate: float) -> Step:
    step: Step = {
        "stage": "train",
        "student": START,
        "data": method.data,
        "objective": dict(method.objective),
        "max_steps": round(settings.steps * method.longer),
        "per_device_batch_size": settings.batch,
        "lr": rate,
        "seed": seed,
    }
    return step | ({"lm_data": method.lm_data} if method.lm_data else {})


def _results(students: list[str], data: list[str]) -> Step:
    return {"stage": "evaluate", "students": students, "data": data}
