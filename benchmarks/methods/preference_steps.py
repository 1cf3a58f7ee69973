"""The recipes of the experiment on preferences: a teacher, students by method, what judges them.

Each recipe is whole: it begins with the files and makes the teacher too, so ``teachercache run``
takes any of them; what another one made already is found done, by content.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEACHER, REFERENCE, ALIGNED = "blank_teacher", "reference", "aligned"
BLANK, START = "blank_student", "sft"
BETA = 1.0  # of the teacher's alignment, of its advantages and of the judge
Steps = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is made: rows of the files, rows of a step, steps of each training."""

    texts: int
    pairs: int
    trials: int
    questions: int
    teacher_steps: int
    align_steps: int
    base_steps: int
    sft_steps: int
    steps: int
    batch_size: int = 32
    responses: int = 2  # to each question
    max_tokens: int = 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Method:
    """A way to go on from ``start``; ``strength`` is the setting that its paper tunes, if any."""

    name: str
    label: str
    objective: Mapping[str, Any]
    strength: str = ""
    centre: float = 1.0
    start: str = START
    support: Mapping[str, Any] = field(default_factory=dict)  # of its advantages, else the default

    def settings(self, factor: float) -> dict[str, Any]:
        """Return the objective with its strength times ``factor``."""
        return dict(self.objective) | (
            {self.strength: self.centre * factor} if self.strength else {}
        )

    @property
    def is_adpa(self) -> bool:
        """Whether it learns from advantages."""
        return bool(self.objective["loss"] == "adpa")


SFT_MORE = Method(name="sft_more", label="SFT, as many steps more", objective={"loss": "sft"})
DPO = Method(name="dpo", label="DPO", objective={"loss": "dpo"}, strength="beta", centre=BETA)
DCKD = Method(
    name="dckd",
    label="DCKD",
    objective={"loss": "dckd", "chosen_weight": 1.0, "rejected_weight": 1.0},
    strength="alpha",
)
ADPA = Method(
    name="adpa", label="ADPA", objective={"loss": "adpa"}, strength="gamma", centre=1.6 / BETA
)  # the published 1.6 multiplies advantages without beta
RELEASED = Method(
    name="adpa_as_released",
    label="ADPA, as released",
    objective={"loss": "adpa", "mode": "as_released"},
    strength="gamma",
    centre=1.6,
    support={"kind": "as_released", "k": 16},
)
UNION = Method(
    name="adpa_union",
    label="ADPA, union_top_k",
    objective={"loss": "adpa"},
    strength="gamma",
    centre=1.6 / BETA,
    support={"kind": "union_top_k", "k": 4},
)
ADPA_PLUS = Method(
    name="adpa_plus",
    label="ADPA+",
    objective={"loss": "adpa"},
    strength="gamma",
    centre=1.6 / BETA,
    start=DCKD.name,
)
METHODS = (SFT_MORE, DPO, DCKD, ADPA, RELEASED, UNION, ADPA_PLUS)
OF_NAME = {method.name: method for method in METHODS}


@dataclass(frozen=True, slots=True)
class Run:
    """One training of a method: its step's name, learning rate, and factor of its strength."""

    step: str
    method: Method
    rate: float
    factor: float = 1.0


def recipe_of(
    name: str,
    folder: Path,
    size: Size,
    seed: int,
    runs: Mapping[str, Run],
    *,
    asked: str,
    judged: bool,
) -> dict[str, Any]:
    """Return a recipe that makes ``runs`` of a seed and lets them and SFT answer ``asked``.

    The run named DCKD, if any, is what ADPA+ starts from. With ``judged`` the responses are scored
    by the aligned teacher, its reference and SFT too.
    """
    steps = _teacher(folder, size) | _start(size, seed)
    for run in runs.values():
        steps |= _tables(run.method, size, seed)
        steps[run.step] = _trained(run, size, seed)
    answering = [START, *runs]
    for student in answering:
        steps |= _answers(student, asked, size, seed, judged=judged)
    engine = {"dtype": "float32", "engine": "transformers"}
    made = [REFERENCE, ALIGNED, *answering]
    paths = {TEACHER: folder / "teacher", BLANK: folder / f"students/{seed}"}
    return {
        "name": name,
        "models": {model: {"path": str(path)} | engine for model, path in paths.items()}
        | {model: {"step": model} | engine for model in dict.fromkeys(made)},
        "steps": steps,
        "execution": {
            "root": str(folder / "cache"),
            "engine": {"device": "cpu", "max_num_batched_tokens": 16_384},
        },
    }


def _pairs(folder: Path, name: str, heldout_fraction: float) -> dict[str, Any]:
    return {
        "stage": "preference_pairs",
        "tokenizer": TEACHER,
        "source": {"kind": "jsonl", "paths": [str(folder / f"{name}.jsonl")]},
        "template": "plain",
        "max_prompt_length": 8,
        "max_response_length": 32,
        "heldout_fraction": heldout_fraction,
    }


def _teacher(folder: Path, size: Size) -> Steps:
    """Return the files, and the teacher: texts, chosen responses, then DPO."""
    texts = {
        "stage": "ingest",
        "tokenizer": TEACHER,
        "source": {"kind": "jsonl", "paths": [str(folder / "texts.jsonl")]},
        "mode": "truncate",
        "length": 32,
        "heldout_fraction": 0.02,
    }
    return {
        "texts": texts,
        "pairs": _pairs(folder, "pairs", 0.1),
        "trials": _pairs(folder, "trials", 0.0),
        "questions": _pairs(folder, "questions", 0.0),
        "teacher": {
            "stage": "train",
            "student": TEACHER,
            "data": ["texts"],
            "objective": {"loss": "cross_entropy"},
            "lr": 3e-3,
            "max_steps": size.teacher_steps,
            "per_device_batch_size": 2 * size.batch_size,
        },
        REFERENCE: {
            "stage": "train",
            "student": "teacher",
            "data": ["pairs"],
            "objective": {"loss": "sft"},
            "lr": 5e-4,
            "max_steps": size.sft_steps,
            "per_device_batch_size": size.batch_size,
        },
        ALIGNED: {
            "stage": "teacher_align",
            "model": REFERENCE,
            "data": "pairs",
            "beta": BETA,
            "lr": 1e-3,
            "max_steps": size.align_steps,
            "per_device_batch_size": size.batch_size,
        },
    }


def _start(size: Size, seed: int) -> Steps:
    """Return the student that every method goes on from: texts, then chosen responses."""
    trained = {"stage": "train", "per_device_batch_size": size.batch_size, "seed": seed}
    return {
        "base": trained
        | {
            "student": BLANK,
            "data": ["texts"],
            "objective": {"loss": "cross_entropy"},
            "lr": 4e-3,
            "max_steps": size.base_steps,
            "per_device_batch_size": 2 * size.batch_size,
        },
        START: trained
        | {
            "student": "base",
            "data": ["pairs"],
            "objective": {"loss": "sft"},
            "lr": 1e-3,
            "max_steps": size.sft_steps,
        },
    }


def _tables(method: Method, size: Size, seed: int) -> Steps:
    """Return the steps whose tables a method reads beside the pairs."""
    match method.objective:
        case {"loss": "dpo"}:
            return {"sft_logprobs": _scored("pairs", START)}
        case {"loss": "dckd"}:
            return {"pair_signals": {"stage": "teacher_logits", "input": "pairs", "model": ALIGNED}}
        case {"loss": "adpa"}:
            own = f"{method.start}_responses"
            return {
                own: {
                    "stage": "responses",
                    "input": "pairs",
                    "model": method.start,
                    "max_tokens": size.max_tokens,
                    "max_rejected_fraction": 0.5,  # an empty response makes no row
                },
                _advantages(method): {
                    "stage": "advantages",
                    "input": own,
                    "model": ALIGNED,
                    "reference": REFERENCE,
                    "beta": BETA,
                    "seed": seed,
                }
                | ({"support": dict(method.support)} if method.support else {}),
            }
    return {}


def _advantages(method: Method) -> str:
    kind = method.support.get("kind")
    return f"{method.start}_advantages" + (f"_{kind}" if kind else "")


def _trained(run: Run, size: Size, seed: int) -> dict[str, Any]:
    method = run.method
    tables = {
        "dpo": ["sft_logprobs"],
        "dckd": ["pair_signals"],
        "adpa": [f"{method.start}_responses", _advantages(method)],
    }
    return {
        "stage": "train",
        "student": method.start,
        "data": ["pairs", *tables.get(method.objective["loss"], [])],
        "objective": method.settings(run.factor),
        "lr": run.rate,
        "max_steps": size.steps,
        "per_device_batch_size": size.batch_size,
        "seed": seed,
    }


def _scored(table: str, model: str) -> dict[str, Any]:
    return {"stage": "response_logprobs", "input": table, "model": model}


def _answers(student: str, asked: str, size: Size, seed: int, *, judged: bool) -> Steps:
    """Return a student's sampled responses, and what others say of them."""
    answers = f"{student}-answers"
    judges = (ALIGNED, REFERENCE, START) if judged else ()
    return {
        answers: {
            "stage": "responses",
            "input": asked,
            "model": student,
            "max_tokens": size.max_tokens,
            "temperature": 1.0,
            "n": size.responses,
            "max_rejected_fraction": 0.5,
            "seed": seed,
        },
        **{f"{answers}-{judge}": _scored(answers, judge) for judge in judges},
    }
