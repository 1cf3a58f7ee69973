"""In-context recipes on a tiny model, end to end: tasks, episodes, scores, students, report."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.dataset import open_dataset
from schemas.storage.manifest import read_manifest
from stages.student.evaluate.by_row import read_rows
from tests.fixtures.tiny_recipe import TinyRecipe, table_bytes, teachercache, write_jsonl

WORDS = ("stone", "river", "cloud", "ember", "grove", "harbor", "meadow", "canyon", "valley")


def write_task(folder: Path, task: str, labels: tuple[str, ...], num_rows: int) -> None:
    """Write a CrossFit file whose inputs no other task has."""
    lines = [
        f"{task} {WORDS[i % 9]} {WORDS[(i * 7 + i // 9) % 9]} {i}\t{labels[i % len(labels)]}\n"
        for i in range(num_rows)
    ]
    path = folder / task / f"{task}_16_100_train.tsv"
    path.parent.mkdir(parents=True)
    path.write_text("".join(lines))


def make_icl_recipe(folder: Path, model: Path, paragraphs: list[str]) -> TinyRecipe:
    """Both methods on one set of episodes, with running text for the LM part."""
    write_task(folder / "tasks", "mood", ("glad", "sad and blue"), 24)
    write_task(folder / "tasks", "kind", ("yes", "no", "maybe"), 24)
    write_task(folder / "tasks", "size", ("big", "small"), 20)
    text = write_jsonl(folder / "a.jsonl", paragraphs[:30])
    train: dict[str, Any] = {"stage": "train", "student": "student", "max_steps": 3, "lr": 1e-3}
    signals = ["episodes", "signals", "preferences"]
    steps: dict[str, Any] = {
        "text": {
            "stage": "ingest",
            "source": {"kind": "jsonl", "paths": [str(text)]},
            "tokenizer": "teacher",
            "length": 48,
            "mode": "pack",
            "heldout_fraction": 0.25,
            "max_rows": 24,
        },
        "text_signals": {"stage": "teacher_logits", "input": "text", "model": "teacher"},
        "episodes": {
            "stage": "episodes",
            "tokenizer": "teacher",
            "sources": [
                {
                    "kind": "crossfit",
                    "paths": [str(folder / "tasks")],
                    "task_kind": "classification",
                }
            ],
            "targets": ["size"],
            "paradigm": "meta",
            "demonstrations": {"min": 3, "max": 4},
            "draw": "partition",
            "draws": 2,
            "support": 8,
            "queries_per_task": 5,
            "max_length": 256,
            "rows_per_shard": 4,
        },
        "signals": {"stage": "teacher_logits", "input": "episodes", "model": "teacher"},
        "preferences": {"stage": "subset_preferences", "input": "episodes", "model": "teacher"},
        "candidates": {"stage": "candidate_scores", "input": "episodes", "model": "teacher"},
        "student": {"stage": "student_init", "model": "teacher", "layers": [0]},
        "bialign": {**train, "data": signals, "objective": {"loss": "bialign"}},
        "icl": {
            **train,
            "data": ["episodes", "candidates"],
            "lm_data": ["text", "text_signals"],
            "objective": {"loss": "icl_distillation"},
        },
        "tuned": {
            **train,
            "data": ["episodes"],
            "objective": {
                "loss": "icl_distillation",
                "alpha_end": 1.0,
                "lm_weight": 0.0,
            },
        },
        "results": {
            "stage": "evaluate",
            "students": ["student", "bialign", "icl", "tuned"],
            "data": [*signals, "candidates"],
        },
    }
    body = {
        "name": "icl",
        "models": {"teacher": {"path": str(model), "dtype": "float32", "engine": "transformers"}},
        "steps": steps,
        "execution": {
            "root": str(folder / "root"),
            "engine": {
                "device": "cpu",
                "num_threads": 1,  # what this process has: another number moves last bits
                "cache_dir": str(folder / "head_check"),
            },
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return TinyRecipe(path, folder / "root")


@pytest.fixture(scope="module")
def recipe(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    return make_icl_recipe(tmp_path_factory.mktemp("icl"), tiny_model, paragraphs)


@pytest.mark.slow
def test_both_methods_run_from_tasks_to_a_report(recipe: TinyRecipe) -> None:
    said = teachercache("run", recipe.path)
    assert said.code == 0, said.err
    for word in ("KL to teacher", "tau-b", "accuracy", "(majority)", "(random)", "(teacher)"):
        assert word in said.out
    report = json.loads((recipe.step("results").folder / "evaluation.json").read_text())
    assert set(report) == {"student", "bialign", "icl", "tuned"}
    (task,) = report["bialign"]["tasks"]
    assert (task["task"], task["num_queries"], task["num_draws"]) == ("size", 5, 2)
    assert set(task["accuracy_by_draw"]) == {"0", "1"}
    assert report["student"]["overall"] != report["bialign"]["overall"]
    rows = read_rows(recipe.step("results").folder).to_pylist()
    right = [row["right"] for row in rows if row["student"] == "bialign"]
    assert len(right) == task["num_episodes"]
    assert sum(right) / len(right) == pytest.approx(task["numbers"]["accuracy"])
    assert teachercache("verify", recipe.root).code == 0

    again = recipe.run()
    assert set(again.states.values()) == {"done"}

    joined = open_dataset(
        [recipe.step(name).folder for name in ("episodes", "signals", "preferences", "candidates")]
    )
    assert joined.num_missing == 0
    row = joined[0]
    assert len(row["next_token_logprobs_P"]) == len(row["input_ids_T"]) - 1
    assert len(row["candidate_logprobs_N"]) == len(row["candidate_lengths_N"])

    for name, word in (
        ("episodes", "demonstration 2"),
        ("preferences", "log Q"),
        ("candidates", "log p"),
    ):
        shown = teachercache("inspect", recipe.step(name).folder, "--rows", "2")
        assert shown.code == 0 and word in shown.out

    split = {shard.split: shard for shard in read_manifest(recipe.step("episodes").folder).shards}
    assert set(split) == {"train", "heldout"}


@pytest.mark.slow
def test_two_workers_write_the_same_scores(recipe: TinyRecipe, tmp_path: Path) -> None:
    if not recipe.step("candidates").folder.is_dir():
        recipe.only("episodes", "preferences", "candidates").run()
    names = ("episodes", "preferences", "candidates")
    before = {name: table_bytes(recipe.step(name).folder) for name in names}
    other = recipe.only(*names)
    other.run(f"execution.root={tmp_path / 'two'}", "execution.workers=2")
    for name in names:
        folder = other.step(name, f"execution.root={tmp_path / 'two'}").folder
        assert table_bytes(folder) == before[name]


def test_a_stage_refuses_another_kind_of_table(recipe: TinyRecipe) -> None:
    said = teachercache("plan", recipe.path, "--set", "steps.candidates.input=text")
    assert said.code == 2
    assert said.error.endswith(
        "steps.candidates.input: step 'text' writes documents, this stage reads episodes"
    )
    said = teachercache("plan", recipe.path, "--set", "steps.results.students=[results]")
    assert said.code == 2 and "neither under 'models' nor an earlier checkpoint" in said.error


def test_more_subsets_than_there_are_is_one_line(recipe: TinyRecipe) -> None:
    said = teachercache(
        "run",
        recipe.only("episodes", "preferences").path,
        "--set",
        "steps.preferences.num_subsets=16",
    )
    assert said.code == 2
    assert "num_subsets is 16, but episodes of 4 demonstrations have 15 subsets" in said.error


def test_an_encoder_is_hashed_by_content_and_takes_nobodys_name(
    recipe: TinyRecipe, tiny_encoder: Path
) -> None:
    prints = []
    for name in ("encoder", "other"):
        steps = recipe.only("episodes", "preferences").plan(
            f"models.{name}={{path: '{tiny_encoder}', engine: transformers, dtype: float32}}",
            f"steps.preferences.sampler={{kind: similarity, encoder: {name}}}",
        )
        assert [step.name for step in steps] == ["episodes", "preferences"]
        assert list(steps[1].models) == ["teacher", name]
        prints.append(steps[1].fingerprint)
    assert prints[0] == prints[1]
    (_, plain) = recipe.only("episodes", "preferences").plan()
    assert plain.fingerprint != prints[0]
