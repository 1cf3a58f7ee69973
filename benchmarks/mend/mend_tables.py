"""What the MEND benchmark reads: real demonstrations, the teacher over them, and a distiller.

All is made by the product itself and lies under ``CACHE/benchmarks`` by fingerprint; the
transformers engine scores, as it starts in seconds and capture is not measured here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recipe_run import run_recipe
from pipeline.planning.recipe import Recipe
from schemas.dataset import open_dataset

MODEL = "models/smollm2-135m-instruct"
TASK = "tasks/crossfit/financial_phrasebank"  # its examples have 39 tokens on average
ENCODINGS = ("exact", "threshold")


@dataclass(frozen=True, slots=True, kw_only=True)
class MendSize:
    """``demonstrations`` for each of ``rows`` queries, a distiller's ``layers`` and ``vectors``."""

    demonstrations: int
    rows: int
    layers: int
    vectors: int


@dataclass(frozen=True, slots=True)
class MendTables:
    """Folders: the reader, which is the teacher, the distiller, the rows and their signals."""

    reader: Path
    distiller: Path
    asked: Path
    signals: dict[str, Path]

    def lengths(self) -> dict[str, float]:
        """Return the mean tokens of a row's demonstrations, query and one demonstration."""
        rows = open_dataset([self.asked], split="train", verify=False)
        shown = [len(rows[index]["distiller_ids_L"]) for index in range(len(rows))]
        whole = [len(rows[index]["input_ids_T"]) for index in range(len(rows))]
        count = rows[0]["num_distiller_demonstrations"]
        mean = sum(shown) / len(rows)
        return {
            "demonstrations": mean,
            "query": sum(whole) / len(rows) - mean,
            "one": mean / count,
        }


def prepared_mend(cache: Path, size: MendSize) -> MendTables:
    """Make whatever is not there yet; exits with a readable line where an asset is missing."""
    for needed, target in ((cache / MODEL, "assets"), (cache / TASK, "tasks")):
        if not needed.exists():
            raise SystemExit(f"{needed} is missing: run `make {target}` first")
    recipe = _recipe(cache, size)
    folders = {name: step.folder for name, step in run_recipe(recipe).items()}
    return MendTables(
        reader=cache / MODEL,
        distiller=folders["distiller"],
        asked=folders["asked"],
        signals={name: folders[name] for name in ENCODINGS},
    )


def _recipe(cache: Path, size: MendSize) -> Recipe:
    source = {"kind": "crossfit", "paths": [str(cache / TASK)], "task_kind": "classification"}
    steps: dict[str, Any] = {
        "episodes": {
            "stage": "episodes",
            "tokenizer": "teacher",
            "sources": [source],
            "paradigm": "meta",
            "demonstrations": size.demonstrations,
            "draw": "resample",
            "max_examples_per_task": max(size.rows, size.demonstrations + 1),
            "max_length": 2048,
        },
        "asked": {"stage": "demonstrations", "input": "episodes"},
        "small": {"stage": "student_init", "model": "teacher", "layers": size.layers},
        "distiller": {
            "stage": "distiller_init",
            "model": "small",
            "reader": "teacher",
            "num_vectors": size.vectors,
        },
    }
    for kind in ENCODINGS:
        steps[kind] = {
            "stage": "teacher_logits",
            "input": "asked",
            "model": "teacher",
            "encoding": {"kind": kind} if kind == "exact" else {"kind": kind, "k": 16},
        }
    model = {"path": str(cache / MODEL), "dtype": "float32", "engine": "transformers"}
    return Recipe.model_validate(
        {
            "name": "benchmark-mend",
            "models": {"teacher": model},
            "steps": steps,
            "execution": {"root": str(cache / "benchmarks")},
        }
    )
