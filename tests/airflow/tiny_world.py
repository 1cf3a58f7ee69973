"""Run by the worker's python: a tiny model, some days' text, and a recipe for Airflow."""

import sys
from pathlib import Path

import yaml

from tests.conftest import PARAGRAPHS, save_tiny_model
from tests.fixtures.tiny_recipe import make_recipe, write_jsonl

# Short texts of three days, and a long one for whatever day it is.
TEXTS = {
    "2026-01-05": (0, 60),
    "2026-01-06": (60, 120),
    "2026-01-07": (500, 520),
    "long": (120, 500),
}


def main(folder: Path) -> None:
    model = save_tiny_model(folder / "model", vocab_size=512)
    for day, (first, last) in TEXTS.items():
        write_jsonl(folder / "text" / f"{day}.jsonl", PARAGRAPHS[first:last])
    training = {
        "small": {"stage": "student_init", "model": "teacher", "layers": 2},
        "distilled": {
            "stage": "train",
            "student": "small",
            "data": ["documents", "signals"],
            "objective": {"loss": "kd", "weight": 0.9},
            "max_steps": 2,
        },
    }
    recipe = make_recipe(folder, model, ["unused"], more_steps=training)
    body = yaml.safe_load(recipe.path.read_text())
    body["steps"]["documents"]["source"]["paths"] = [str(folder / "text" / "${DS}.jsonl")]
    body["steps"]["documents"]["rows_per_shard"] = 32
    body["steps"]["signals"]["encoding"] = {"kind": "exact"}
    body["execution"]["group_size"] = 20
    body["schedule"] = {"retries": 0}
    sys.stdout.write(yaml.safe_dump(body, sort_keys=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
