"""Run by the worker's python: a tiny model, two days of text, and a recipe for Airflow, in a folder."""

import sys
from pathlib import Path

import yaml

from tests.conftest import PARAGRAPHS, save_tiny_model
from tests.tiny_recipe import make_recipe, write_jsonl

DAYS = ("2026-01-05", "2026-01-06")
TEXTS_A_DAY = 330


def main(folder: Path) -> None:
    model = save_tiny_model(folder / "model", vocab_size=512)
    for number, day in enumerate(DAYS):
        texts = PARAGRAPHS[number * TEXTS_A_DAY : (number + 1) * TEXTS_A_DAY]
        write_jsonl(folder / "text" / f"{day}.jsonl", texts)
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
    body["execution"]["group_size"] = 16
    body["schedule"] = {"retries": 0}
    print(yaml.safe_dump(body, sort_keys=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
