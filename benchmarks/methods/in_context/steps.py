"""The steps of the in-context recipes: teacher, starts, episodes, signals, training, results."""

from pathlib import Path
from typing import Any

from benchmarks.methods.in_context.methods import CLEAR, START, TIE_TOLERANCE, Method, Settings
from benchmarks.methods.in_context.world import KINDS, TOKENS

Step = dict[str, Any]
LM_BATCH = 16  # rows of a step of language modelling
TEMPLATE = {"demonstration": "{input} {output}", "separator": " ; "}


def tuning_tasks(settings: Settings) -> int:
    """Return the number of tasks of each kind that learning rates are searched on."""
    return max(2, settings.judged_tasks // 4)


def steps_before(folder: Path, settings: Settings, asked: str) -> dict[str, Step]:
    """Everything that is made before a method's training."""
    return {
        **teacher_steps(folder, settings),
        **start_steps(folder, settings),
        **cached_steps(folder, settings, asked),
    }


def teacher_steps(folder: Path, settings: Settings) -> dict[str, Step]:
    """The teacher, trained from nothing: what labels follow from, of few classes, of all, the rest.

    A model that has found in few classes how a label is looked up learns more of them soon; one
    with a weight decay looks for it sooner by a word's class than by the word itself.
    """
    return {
        "labels": labels_step(folder, settings),
        "corpus": _corpus(folder, settings, "corpus", labels_alone=True),
        "whole": _corpus(folder, settings, "whole"),
        "teacher_first": {
            **_language_model("blank_teacher", "labels", settings.teacher_first_steps, lr=2e-3),
            "scheduler": "constant_with_warmup",
            "weight_decay": 0.3,
        },
        "teacher_labels": {
            **_language_model("teacher_first", "corpus", settings.teacher_steps, lr=2e-3),
            "weight_decay": 0.3,
        },
        "teacher_trained": _language_model(
            "teacher_labels", "whole", settings.teacher_whole_steps, lr=3e-4
        ),
    }


def labels_step(folder: Path, settings: Settings) -> Step:
    return _corpus(folder, settings, "start", labels_alone=True)


def start_steps(folder: Path, settings: Settings) -> dict[str, Step]:
    """The student's start: a training of the same two kinds, on few classes alone."""
    return {
        "labels": labels_step(folder, settings),
        "start_whole": _corpus(folder, settings, "start"),
        "base": {
            **_language_model("blank_student", "labels", settings.start_steps, lr=4e-3),
            "scheduler": "constant_with_warmup",
        },
        START: _language_model("base", "start_whole", settings.start_whole_steps, lr=1e-3),
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


def cached_steps(folder: Path, settings: Settings, asked: str) -> dict[str, Step]:
    """Episodes and running text, and what the teacher says of them, once for all seeds.

    Multitask-ICT trains on examples of the tasks that are ``asked``.
    """
    steps: dict[str, Step] = {
        "text": _text(folder, settings),
        "text_logits": signal_step("teacher_logits", "text"),
        "episodes": episodes_step(settings, "train", folder),
        "noisy": episodes_step(settings, "noisy", folder),
        "multi": episodes_step(settings, asked, folder, multitask=True),
        **{
            name: episodes_step(settings, name, folder) for name in dict.fromkeys((asked, "tuning"))
        },
    }
    for rows in ("episodes", "noisy", "multi", asked):
        steps[f"{rows}_candidates"] = signal_step("candidate_scores", rows)
    for rows in ("episodes", "tuning"):
        steps[f"{rows}_preferences"] = signal_step("subset_preferences", rows)
    steps[f"episodes_{CLEAR}"] = {
        **steps["episodes_preferences"],
        "tie_tolerance": TIE_TOLERANCE,
    }
    steps["episodes_logits"] = signal_step("teacher_logits", "episodes")
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


def episodes_step(settings: Settings, tasks: str, folder: Path, *, multitask: bool = False) -> Step:
    """Training episodes of ``train`` or ``noisy``; of other tasks asking ones, or multitask's.

    Training steps measure a query of each held-out task before and after. ``judged`` asks tasks of
    novel classes too.
    """
    trains = tasks in ("train", "noisy") or multitask
    held_out = "tuning" if tasks in ("train", "noisy") else tasks
    counts = {held_out: len_of(settings, held_out)}
    if tasks == "judged" and not multitask:
        counts["novel"] = settings.novel_tasks
    files = dict.fromkeys((tasks, *counts))
    return {
        "stage": "episodes",
        "tokenizer": "blank_teacher",
        "sources": [{"kind": "metaicl", "paths": [str(folder / f"{f}.jsonl") for f in files]}],
        "targets": [
            f"{name}_{kind}_{number}"
            for name, count in counts.items()
            for kind in KINDS
            for number in range(count)
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
    """Return how many tasks of each kind are ``judged`` or ``tuning``."""
    return settings.judged_tasks if tasks == "judged" else tuning_tasks(settings)


def signal_step(stage: str, rows: str) -> Step:
    return {"stage": stage, "input": rows, "model": "teacher"}


def training_step(method: Method, settings: Settings, seed: int, rate: float) -> Step:
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


def results_step(students: list[str], data: list[str]) -> Step:
    return {"stage": "evaluate", "students": students, "data": data}
