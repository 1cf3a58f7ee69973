"""MEND as a recipe on a tiny model: what is read, the teacher over it, and what is trained."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.dataset import open_dataset
from schemas.scored_spans import span_targets
from schemas.storage.manifest import read_manifest
from stages.models.checkpoints.checkpoint import read_checkpoint
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    error_of,
    make_recipe,
    stamps,
    teachercache,
)

STEPS: dict[str, Any] = {
    "shown": {"stage": "demonstrations", "input": "documents"},
    "shown_signals": {
        "stage": "teacher_logits",
        "input": "shown",
        "model": "teacher",
        "encoding": {"kind": "exact"},
    },
}
SETTINGS = {"stage": "train", "max_steps": 2, "lr": 1e-3, "per_device_batch_size": 4}
STAGE_1 = {"loss": "mend", "answer_weight": 0.0}
TRAINING: dict[str, Any] = {
    "small": {"stage": "student_init", "model": "teacher", "layers": [0]},
    "distiller": {
        "stage": "distiller_init",
        "model": "small",
        "reader": "teacher",
        "num_vectors": 4,
    },
    "distilled": {
        **SETTINGS,
        "student": "distiller",
        "reader": "teacher",
        "data": ["shown", "shown_signals"],
        "objective": STAGE_1,
    },
    "for_small": {
        "stage": "distiller_init",
        "model": "small",
        "reader": "small",
        "num_vectors": 4,
        "lora_rank": 2,
    },
    "variant": {
        **SETTINGS,
        "student": "for_small",
        "reader": "small",
        "data": ["shown", "shown_signals"],
        "objective": {**STAGE_1, "cross_model": True},
    },
    "results": {
        "stage": "evaluate",
        "students": ["distiller", "distilled"],
        "reader": "teacher",
        "data": ["shown", "shown_signals"],
    },
    "results_of_variant": {
        "stage": "evaluate",
        "students": ["variant"],
        "reader": "small",
        "data": ["shown", "shown_signals"],
    },
}


@pytest.fixture(scope="module")
def recipe(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    folder = tmp_path_factory.mktemp("mend")
    return make_recipe(folder, tiny_model, paragraphs[:20], more_steps=STEPS | TRAINING)


@pytest.mark.slow
def test_a_step_without_a_model_is_a_step_like_any_other(recipe: TinyRecipe) -> None:
    """Planned, run, joined with its signals, verified; a second run changes nothing."""
    assert "pending" in teachercache("plan", recipe.path).out
    said = teachercache("run", recipe.path, "--step", "documents")
    for name in ("shown", "shown_signals"):
        said = teachercache("run", recipe.path, "--step", name)
        assert said.code == 0, said.err
    shown, signals = (recipe.step(name).folder for name in ("shown", "shown_signals"))
    manifest = read_manifest(shown)
    assert manifest is not None
    source = read_manifest(recipe.step("documents").folder)
    assert source is not None
    assert (manifest.tokenizer, manifest.vocab_size) == (source.tokenizer, source.vocab_size)
    assert manifest.identity["models"] == []
    joined = open_dataset([shown, signals])
    assert joined.num_missing == 0 and len(joined) == manifest.num_rows
    for index in range(len(joined)):
        row = joined[index]
        targets_P = span_targets(row["scored_S2"])
        assert row["first_target"] == row["query_start"] + 1 == targets_P[0]
        assert len(row["hidden_PD"]) == len(targets_P)
    before = stamps(recipe.root)
    assert teachercache("run", recipe.path, "--step", "shown").code == 0
    assert stamps(recipe.root) == before
    assert teachercache("verify", recipe.root).code == 0
    shown_rows = teachercache("inspect", shown, "--rows", "1")
    assert shown_rows.code == 0 and "teacher, distiller" in shown_rows.out
    assert np.isfinite(row["entropies_P"]).all()


def test_another_budget_is_another_table(recipe: TinyRecipe) -> None:
    names = [
        recipe.step("shown_signals", f"steps.shown.distiller_tokens={n}").fingerprint
        for n in (500, 501)
    ]
    assert len({*names, recipe.step("shown_signals").fingerprint}) == 3


@pytest.mark.slow
def test_a_budget_that_leaves_no_demonstration_ends_the_run_in_one_line(
    recipe: TinyRecipe,
) -> None:
    assert teachercache("run", recipe.path, "--step", "documents").code == 0
    budget = ("--set", "steps.shown.distiller_tokens=1")
    said = teachercache("run", recipe.path, "--step", "shown", *budget)
    assert said.code == 3
    assert "8 x 'no whole demonstration fits distiller_tokens 1', first sample" in said.error


@pytest.mark.slow
def test_a_distiller_is_trained_by_its_teacher_or_labelled(recipe: TinyRecipe) -> None:
    said = teachercache("run", recipe.path)
    assert said.code == 0, said.err
    assert "variant (cross_model)" in said.out and "distilled (cross_model)" not in said.out
    metrics = {
        name: json.loads((recipe.step(name).folder / "metrics.json").read_text())
        for name in ("distilled", "variant")
    }
    assert metrics["distilled"]["train"]["cross_model"] == 0.0
    assert metrics["variant"]["train"]["cross_model"] == 1.0
    for name, label in (("results", 0.0), ("results_of_variant", 1.0)):
        record = read_checkpoint(recipe.step(name).folder)
        assert record is not None
        assert {found["cross_model"] for found in record.metrics.values()} == {label}
        beside = {"zero-shot", "random vectors", "mean pooling", "fewer shots"}
        assert {*beside, "all demonstrations"} < set(record.metrics)
        read = {one: found["positions_before_query"] for one, found in record.metrics.items()}
        assert read["zero-shot"] == 0 and read["all demonstrations"] > read["mean pooling"] == 4
    assert "results_of_variant (cross_model)" in said.out and "zero-shot" in said.out
    assert "(majority)" not in said.out  # documents have no candidates
    assert re.search("fewer shots: [0-9]+ rows read no demonstration", said.out)
    after = read_checkpoint(recipe.step("results").folder)
    assert after is not None
    trained = metrics["distilled"]["after"]["kl_to_teacher"]
    assert after.metrics["distilled"]["kl_to_teacher"] == pytest.approx(trained, rel=1e-5)
    adapted = recipe.step("variant").folder / "config.json"  # trained by LoRA
    assert json.loads(adapted.read_text())["lora_rank"] == 2
    for found in metrics.values():
        assert found["before"]["kl_to_teacher"] != found["after"]["kl_to_teacher"]
    assert set(recipe.run().states.values()) == {"done"}
    assert teachercache("verify", recipe.root).code == 0


@pytest.mark.slow
def test_the_command_measures_a_distiller_as_the_step_does(
    recipe: TinyRecipe, tiny_model: Path
) -> None:
    """And says in one line where a reader is missing, another one, or out of place."""
    assert teachercache("run", recipe.path).code == 0
    names = ("distilled", "variant", "small")
    places = {name: Path(str(recipe.step(name).folder)) for name in names}
    data = [
        word
        for name in ("shown", "shown_signals")
        for word in ("--data", str(recipe.step(name).folder))
    ]
    for name, reader, step in (
        ("distilled", tiny_model, "results"),
        ("variant", places["small"], "results_of_variant"),
    ):
        asked: list[str | Path] = ["evaluate", places[name], "--reader", reader, *data]
        said = teachercache(*asked, "--json")
        assert said.code == 0, said.err
        body = json.loads(said.out)
        record = read_checkpoint(recipe.step(step).folder)
        assert record is not None
        metrics = {**record.metrics, "distiller": record.metrics[name]}
        assert body["cross_model"] == metrics[name]["cross_model"]
        for one in ("distiller", "zero-shot", "mean pooling", "all demonstrations"):
            found = body[one]["overall"]["kl_to_teacher"]
            assert found == pytest.approx(metrics[one]["kl_to_teacher"], abs=1e-6)
    said = teachercache(*asked)
    assert said.code == 0 and "(cross_model)" in said.out and "fewer shots" in said.out
    said = teachercache("evaluate", places["distilled"], *data)
    assert said.code == 2 and "--reader is not given and" in said.error
    said = teachercache("evaluate", places["distilled"], "--reader", places["small"], *data)
    assert said.code == 2 and "the distiller was made for reader" in said.error
    said = teachercache("evaluate", tiny_model, "--reader", tiny_model, *data)
    assert said.code == 2 and "expected a distiller" in said.error
    documents = recipe.step("documents").folder
    said = teachercache("evaluate", tiny_model, "--reader", tiny_model, "--data", documents)
    assert said.code == 2 and "is table documents: a distiller is measured by" in said.error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "steps.variant.objective.cross_model=false",
            "steps.variant.reader: 'small' is not the model that made 'shown_signals': name that "
            "one, or set objective.cross_model to true",
        ),
        (
            "steps.distilled.objective.cross_model=true",
            "steps.distilled.objective.cross_model: is true, and reader 'teacher' is the very "
            "model that made 'shown_signals'",
        ),
        (
            "steps.results.data=[documents, signals]",
            "steps.results.data: step 'documents' writes documents, with a reader the first is",
        ),
        ("steps.results.students=[distilled, teacher]", "students: 'teacher' is the reader"),
        ("steps.distilled.reader=null", "objective 'mend' needs 'reader'"),
        ("steps.distilled.reader=nobody", "steps.distilled.reader: 'nobody' is neither under"),
    ],
)
def test_a_reader_that_is_not_the_teacher_is_named_so(
    recipe: TinyRecipe, override: str, message: str
) -> None:
    assert message in str(error_of(recipe, override))


def test_a_reader_is_named_by_content(recipe: TinyRecipe) -> None:
    before = recipe.step("distilled")
    assert before.identity["models"][1] == before.inputs[1].identity["models"][0]
    assert "reader" not in before.identity["config"]
    # What vLLM alone is told moves the teacher's numbers and leaves the reader that teacher.
    on_vllm = ("models.teacher.engine=vllm", "execution.engine.extra={quantization: fp8}")
    after = recipe.step("distilled", *on_vllm)
    assert after.fingerprint != recipe.step("distilled", on_vllm[0]).fingerprint
    assert after.identity["models"][1] != after.inputs[1].identity["models"][0]
