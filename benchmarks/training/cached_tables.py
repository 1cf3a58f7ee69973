"""The tables and the student that the training benchmarks share, made by the product itself.

They lie under ``CACHE/benchmarks`` by fingerprint, so they are made once; the transformers engine
scores them, as it starts in seconds and the benchmarks here do not measure capture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recipe_run import run_recipe
from pipeline.planning.recipe import Recipe

MODEL = "models/smollm2-135m-instruct"
TEXT = "text/c4_demo.jsonl"
ENCODINGS: dict[str, dict[str, Any]] = {
    "threshold": {"kind": "threshold", "k": 16},
    "tau-0.04": {"kind": "threshold", "tau": 0.04},
    "tau-0.025": {"kind": "threshold", "tau": 0.025},
    "exact": {"kind": "exact"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much text: ``pages`` of the demo text, packed into rows of ``length`` tokens."""

    pages: int
    length: int
    heldout_fraction: float


# What `--quick` takes everywhere, so that it is made once: 49 rows to train on, 4 held out.
QUICK_SIZE, QUICK_LAYERS = Size(pages=6, length=64, heldout_fraction=0.15), 4


@dataclass(frozen=True, slots=True)
class Tables:
    """Folders of the documents, of each encoding's signals, and of the models.

    ``spans`` are those of the teacher's own tokenizer, a token each, so that a student of any
    objective has the same rows and the same head.
    """

    teacher: Path
    student: Path
    documents: Path
    signals: dict[str, Path]
    spans: Path

    def joined(self, encoding: str) -> tuple[Path, Path]:
        """Return the folders to open together for one encoding."""
        return self.documents, self.signals[encoding]


def prepared_tables(cache: Path, size: Size, *, layers: int) -> Tables:
    """Make whatever is not there yet; exits with a readable line where an asset is missing."""
    for needed in (cache / MODEL, cache / TEXT):
        if not needed.exists():
            raise SystemExit(f"{needed} is missing: run `python examples/fetch_assets.py` first")
    root = cache / "benchmarks"
    recipe = _recipe(root, cache / MODEL, _pages(cache / TEXT, root, size.pages), size, layers)
    folders = {name: step.folder for name, step in run_recipe(recipe).items()}
    return Tables(
        teacher=cache / MODEL,
        student=folders["student"],
        documents=folders["documents"],
        signals={name: folders[name] for name in ENCODINGS},
        spans=folders["spans"],
    )


def _pages(text: Path, root: Path, count: int) -> Path:
    """Write the first ``count`` lines of a jsonl beside the tables."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"c4_demo-{count}.jsonl"
    with text.open(encoding="utf-8") as lines:
        body = "".join(line for _, line in zip(range(count), lines, strict=False))
    if not path.is_file() or path.read_text(encoding="utf-8") != body:
        path.write_text(body, encoding="utf-8")
    return path


def _recipe(root: Path, teacher: Path, text: Path, size: Size, layers: int) -> Recipe:
    documents = {
        "stage": "ingest",
        "source": {"kind": "jsonl", "paths": [str(text)]},
        "tokenizer": "teacher",
        "length": size.length,
        "mode": "pack",
        "heldout_fraction": size.heldout_fraction,
        "min_chars": 200,
        "rows_per_shard": 64,
    }
    signals = {
        name: {
            "stage": "teacher_logits",
            "input": "documents",
            "model": "teacher",
            "encoding": encoding,
        }
        for name, encoding in ENCODINGS.items()
    }
    spans = {
        "stage": "aligned_spans",
        "input": "tau-0.04",
        "documents": "documents",
        "teacher": "teacher",
        "tokenizer": "teacher",
        "entries": True,
    }
    student = {"stage": "student_init", "model": "teacher", "layers": layers}
    model = {"path": str(teacher), "dtype": "float32", "engine": "transformers"}
    return Recipe.model_validate(
        {
            "name": "benchmarks",
            "models": {"teacher": model},
            "steps": {"documents": documents, **signals, "spans": spans, "student": student},
            "execution": {"root": str(root)},
        }
    )
