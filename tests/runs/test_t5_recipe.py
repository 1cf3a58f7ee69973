"""MEND as a recipe with a tiny T5: both stages, from files to a report."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.dataset import open_dataset
from stages.models.checkpoints.checkpoint import read_checkpoint
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, stamps, teachercache
from tests.fixtures.tiny_t5 import save_t5

EXACT = {"kind": "exact"}
TRAIN: dict[str, Any] = {"stage": "train", "reader": "t5", "max_steps": 2, "lr": 1e-3}
TEMPLATE = {"demonstration": "{input} {output}", "separator": " ; "}
LABELS = ("no", "yes")


def steps(tasks: Path) -> dict[str, Any]:
    return {
        "shown": {"stage": "demonstrations", "input": "documents"},
        "shown_signals": {"stage": "teacher_logits", "input": "shown", "model": "t5"},
        "episodes": {
            "stage": "episodes",
            "sources": [{"kind": "crossfit", "paths": [str(tasks)], "task_kind": "classification"}],
            "tokenizer": "t5",
            "template": TEMPLATE,
            "targets": ["target"],
            "paradigm": "meta",
            "draw": "resample",
            "support": 5,
            "demonstrations": 2,
            "max_length": 120,
        },
        "asked": {"stage": "demonstrations", "input": "episodes"},
        "asked_signals": {
            "stage": "teacher_logits",
            "input": "asked",
            "model": "t5",
            "encoding": EXACT,
        },
        "distiller": {"stage": "distiller_init", "model": "t5", "reader": "t5", "num_vectors": 4},
        "stage_1": {
            **TRAIN,
            "student": "distiller",
            "data": ["shown", "shown_signals"],
            "objective": {"loss": "mend", "answer_weight": 0.0},
        },
        "stage_2": {
            **TRAIN,
            "student": "stage_1",
            "data": ["asked", "asked_signals"],
            "objective": {"loss": "mend"},
        },
        "results": {
            "stage": "evaluate",
            "students": ["stage_2"],
            "reader": "t5",
            "data": ["asked", "asked_signals"],
        },
    }


@pytest.fixture(scope="module")
def recipe(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    folder = tmp_path_factory.mktemp("t5")
    tasks = folder / "tasks"
    tasks.mkdir()
    for name in ("source", "target"):
        rows = [f"{name} number {i}\t{LABELS[i % 2]}\n" for i in range(30)]
        (tasks / f"{name}_16_13_train.tsv").write_text("".join(rows))
    t5 = save_t5(folder / "model", "newer")
    made = make_recipe(folder, t5, paragraphs[:12], more_steps=steps(tasks))
    body = yaml.safe_load(made.path.read_text())
    body["models"]["t5"] = body["models"].pop("teacher")
    body["steps"]["documents"]["tokenizer"] = "t5"
    del body["steps"]["signals"]
    made.path.write_text(yaml.safe_dump(body, sort_keys=False))
    return made


@pytest.mark.slow
def test_both_stages_and_a_report(recipe: TinyRecipe, tmp_path: Path) -> None:
    """A second run changes nothing; vectors of a task are made as for any distiller."""
    said = teachercache("run", recipe.path)
    assert said.code == 0, said.err
    before = stamps(recipe.root)
    assert teachercache("run", recipe.path).code == 0
    assert stamps(recipe.root) == before
    assert teachercache("verify", recipe.root).code == 0
    for name, is_answer in (("shown", False), ("asked", True)):
        folders = [recipe.step(step).folder for step in (name, f"{name}_signals")]
        joined = open_dataset(folders)
        assert joined.num_missing == 0 and len(joined)
        for row in (joined[index] for index in range(len(joined))):
            first = row["answer_start"] if is_answer else row["query_start"] + 1
            assert row["first_target"] == first
            assert len(row["entropies_P"]) == len(row["input_ids_T"]) - first
    record = read_checkpoint(recipe.step("results").folder)
    assert record is not None
    assert {"stage_2", "zero-shot", "all demonstrations"} < set(record.metrics)
    assert record.metrics["stage_2"]["cross_model"] == 0.0
    assert 0 <= record.metrics["stage_2"]["kl_to_teacher"] < 100
    made = teachercache(
        "mend", "vectors", recipe.step("stage_2").folder, tmp_path / "vectors",
        "--data", recipe.step("asked").folder,
    )  # fmt: skip
    assert made.code == 0, made.err
    assert list((tmp_path / "vectors").glob("*.safetensors"))
