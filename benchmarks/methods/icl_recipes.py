"""Recipes of the in-context experiments: one a seed, on one root, so what is shared is made once.

Each is an ordinary file: ``teachercache run FOLDER/seed_0.yaml`` makes that seed's rows again. A
seed is a student's random weights, the order of its start's training and of each method's; teacher,
tasks, episodes and signals are the same for all seeds, as one cache serves many students.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.methods.icl_world import (
    TOKENS,
    World,
    save_model,
    write_corpus,
    write_rows,
    write_texts,
)

Step = dict[str, Any]
TEMPLATE = {"demonstration": "{input} {output}", "separator": " ; "}
START = "start"
RATES = (1e-3, 3e-3)
# A step of BiAlign over one of output alignment, in tokens that the student reads: an episode and
# four subsets of its demonstrations, of half of them on average.
SUBSETS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is made and trained; examples are counted a task."""

    teacher_width: int
    teacher_layers: int
    teacher_steps: int
    student_width: int
    student_layers: int
    start_steps: int
    steps: int
    batch: int
    train_tasks: int
    train_examples: int
    judged_tasks: int
    judged_queries: int
    seeds: tuple[int, ...]
    teacher_batch: int = 16
    teacher_examples: int = 16
    support: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a student is trained on: an objective, the tables about its episodes, and running text.

    ``longer`` multiplies the steps.
    """

    said: str
    objective: Mapping[str, Any]
    signals: tuple[str, ...] = ()
    multitask: bool = False
    longer: float = 1.0

    @property
    def rows(self) -> str:
        """The step that draws its episodes."""
        return "multi" if self.multitask else "episodes"

    @property
    def data(self) -> list[str]:
        """The steps of ``data``."""
        return [self.rows, *(f"{self.rows}_{signal}" for signal in self.signals)]

    @property
    def lm_data(self) -> list[str]:
        """The steps of ``lm_data``."""
        if not self.objective.get("lm_weight"):
            return []
        return ["text", "text_logits"] if self.signals else ["text"]


def _icl(hard: bool, lm_weight: float) -> dict[str, Any]:
    alpha_end = 1.0 if hard else 0.0
    return {"loss": "icl_distillation", "alpha_end": alpha_end, "lm_weight": lm_weight}


def _bialign(rank_weight: float, kl_reduction: str = "mean") -> Method:
    summed = ", KL summed over positions" if kl_reduction == "sum" else ""
    return Method(
        said=f"BiAlign, lambda {rank_weight:g}{summed}",
        objective={"loss": "bialign", "rank_weight": rank_weight, "kl_reduction": kl_reduction},
        signals=("logits", "preferences"),
    )


def _ict(*, multitask: bool) -> dict[str, Method]:
    """In-context tuning and ICL-D, each without and with the LM term."""
    prefix, where = ("multi_", "Multitask") if multitask else ("", "Meta")
    found = {}
    for name, hard in (("tuned", True), ("distilled", False)):
        for ending, weight in (("", 0.0), ("_lm", 0.2)):
            what = f"{where}-ICT" if hard else f"ICL-D, {where}-ICT"
            found[f"{prefix}{name}{ending}"] = Method(
                said=what + (" with LM term" if weight else ""),
                objective=_icl(hard, weight),
                signals=() if hard else ("candidates",),
                multitask=multitask,
            )
    return found


METHODS: dict[str, Method] = {
    "fine_tuned": Method(said="fine-tuning, every token", objective={"loss": "cross_entropy"}),
    "output_align": Method(said="output alignment", objective={"loss": "kd"}, signals=("logits",)),
    "output_align_long": Method(
        said="output alignment, three times the steps",
        objective={"loss": "kd"},
        signals=("logits",),
        longer=1.0 + SUBSETS / 2,
    ),
    "bialign": _bialign(1.0),
    "bialign_005": _bialign(0.05),
    "bialign_sum": _bialign(1.0, kl_reduction="sum"),
    **_ict(multitask=False),
    **_ict(multitask=True),
}


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
    judged = world.new_tasks(settings.judged_tasks)
    tuning = world.new_tasks(tuning_tasks(settings))
    train = world.new_tasks(settings.train_tasks)
    asked = settings.support + settings.judged_queries
    write_rows(folder / "judged.jsonl", world.task_rows(judged, "judged", asked))
    write_rows(folder / "tuning.jsonl", world.task_rows(tuning, "tuning", asked))
    write_rows(folder / "train.jsonl", world.task_rows(train, "train", settings.train_examples))
    per_row = settings.teacher_examples * TOKENS
    rows = settings.teacher_steps * settings.teacher_batch
    write_corpus(folder / "corpus.parquet", world.corpus(rows, per_row))
    write_texts(folder / "text.jsonl", world.sentences(1000, per_row))
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
    folder: Path, settings: Settings, seed: int, rates: Mapping[str, tuple[float, ...]]
) -> Path:
    """Write ``seed_<seed>.yaml``: each of ``METHODS`` at each of its rates, judged.

    With several rates a method the recipe is a search, judged on tasks that nothing else is.
    """
    search = any(len(found) > 1 for found in rates.values())
    models = {
        "teacher": {"step": "teacher_trained", **_HELD},
        "blank_teacher": {"path": str(folder / "teacher"), **_HELD},
        "blank_student": {"path": str(folder / f"student_{seed}"), **_HELD},
    }
    asked = "tuning" if search else "judged"
    trained: dict[str, Step] = {}
    for name, method in METHODS.items():
        for rate in rates[name]:
            trained[step_name(name, rate) if search else name] = _training(
                method, settings, seed, rate
            )
    steps = {
        **_teacher_steps(folder, settings, seed),
        **_cached_steps(folder, settings),
        **trained,
        "results": _results([START, *trained], [asked, f"{asked}_candidates"]),
    }
    if not search:
        subset_steps = ("tuning", "tuning_candidates", "tuning_preferences")
        steps["subset_results"] = _results([START, *_SHARE_SUBSETS], list(subset_steps))
    body = {
        "name": f"icl-seed-{seed}" + ("-search" if search else ""),
        "models": models,
        "steps": steps,
        "execution": {"root": str(folder / "cache"), "engine": {"device": "cpu"}},
    }
    path = folder / f"{'search' if search else 'seed'}_{seed}.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def step_name(method: str, rate: float) -> str:
    """Return the name of a step of the search."""
    return f"{method}_at_{rate:g}".replace("-", "_").replace(".", "_")


_HELD = {"dtype": "float32", "engine": "transformers"}
_SHARE_SUBSETS = tuple(name for name, method in METHODS.items() if not method.multitask)


def _teacher_steps(folder: Path, settings: Settings, seed: int) -> dict[str, Step]:
    """The teacher, trained from nothing, and the student's short start."""
    trained = {"stage": "train", "data": ["corpus"], "objective": {"loss": "cross_entropy"}}
    return {
        "corpus": {
            "stage": "token_files",
            "source": {
                "kind": "parquet",
                "paths": [str(folder / "corpus.parquet")],
                "mask": "learned",
            },
            "tokenizer": "blank_teacher",
            "length": settings.teacher_examples * TOKENS,
            "heldout_fraction": 0.01,
        },
        "teacher_trained": {
            **trained,
            "student": "blank_teacher",
            "max_steps": settings.teacher_steps,
            "per_device_batch_size": settings.teacher_batch,
            "lr": 2e-3,
        },
        START: {
            **trained,
            "student": "blank_student",
            "max_steps": settings.start_steps,
            "per_device_batch_size": settings.teacher_batch,
            "lr": 4e-3,
            "seed": seed,
        },
    }


def _cached_steps(folder: Path, settings: Settings) -> dict[str, Step]:
    """Episodes and running text, and what the teacher says of them, once for all seeds."""
    steps: dict[str, Step] = {
        "text": _texts([str(folder / "text.jsonl")], settings.teacher_examples * TOKENS),
        "text_logits": _signal("teacher_logits", "text"),
        "episodes": _episodes(folder, settings, "train"),
        "multi": _episodes(folder, settings, "judged", multitask=True),
        "judged": _episodes(folder, settings, "judged"),
        "tuning": _episodes(folder, settings, "tuning"),
    }
    for rows in ("episodes", "multi", "judged", "tuning"):
        steps[f"{rows}_candidates"] = _signal("candidate_scores", rows)
    for rows in ("episodes", "tuning"):
        steps[f"{rows}_preferences"] = _signal("subset_preferences", rows)
    steps["episodes_logits"] = _signal("teacher_logits", "episodes")
    return steps


def _texts(paths: list[str], length: int) -> Step:
    return {
        "stage": "ingest",
        "source": {"kind": "jsonl", "paths": paths},
        "tokenizer": "blank_teacher",
        "length": length,
        "mode": "truncate",
        "heldout_fraction": 0.01,
    }


def _episodes(folder: Path, settings: Settings, tasks: str, *, multitask: bool = False) -> Step:
    """Training episodes of ``train``; of other tasks those that ask, or train, multitask.

    Training steps measure a query of each held-out task before and after.
    """
    trains = tasks == "train" or multitask
    held_out = "tuning" if tasks == "train" else tasks
    count = settings.judged_tasks if held_out == "judged" else tuning_tasks(settings)
    files = ("train", "tuning") if tasks == "train" else (tasks,)
    return {
        "stage": "episodes",
        "tokenizer": "blank_teacher",
        "sources": [{"kind": "metaicl", "paths": [str(folder / f"{f}.jsonl") for f in files]}],
        "targets": [f"{held_out}_{number}" for number in range(count)],
        "paradigm": "multitask" if multitask else "meta",
        "demonstrations": {"min": 4, "max": 10} if trains else 8,
        "draw": "resample",
        "support": settings.support,
        **({"queries_per_task": 1} if trains else {}),
        "template": TEMPLATE,
        "max_length": 48,
    }


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
