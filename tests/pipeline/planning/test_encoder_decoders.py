"""Where a recipe may name an encoder-decoder: the line that refuses it anywhere else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.cached_data import save_model
from tests.fixtures.tiny_recipe import TinyRecipe, error_of, make_recipe
from tests.fixtures.tiny_t5 import save_t5, save_t5_tokenizer

TRAIN = {"stage": "train", "max_steps": 2, "student": "distiller", "reader": "t5"}
STEPS: dict[str, Any] = {
    "shown": {"stage": "demonstrations", "input": "documents"},
    "shown_signals": {"stage": "teacher_logits", "input": "shown", "model": "t5"},
    "distiller": {"stage": "distiller_init", "model": "t5", "reader": "t5", "num_vectors": 4},
    "distilled": {
        **TRAIN,
        "data": ["shown", "shown_signals"],
        "objective": {"loss": "mend", "answer_weight": 0.0},
    },
    "results": {
        "stage": "evaluate",
        "students": ["distilled"],
        "reader": "t5",
        "data": ["shown", "shown_signals"],
    },
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    """The tables are of a T5's ids; ``signals``, of documents, is not part of it."""
    folder = tmp_path_factory.mktemp("encoder_decoder")
    t5 = save_t5(folder / "t5", "older")
    made = make_recipe(folder, t5, ["w1 w2"], more_steps=STEPS)
    text = made.path.read_text().replace("teacher:", "t5:").replace("teacher\n", "t5\n")
    body = yaml.safe_load(text)
    save_model(folder / "causal", seed=1, num_layers=1)
    save_t5_tokenizer(folder / "causal")
    body["models"]["causal"] = body["models"]["t5"] | {"path": str(folder / "causal")}
    made.path.write_text(yaml.safe_dump(body, sort_keys=False))
    return made.only("documents", *STEPS)


def test_teacher_distiller_and_reader_may_be_one(recipe: TinyRecipe) -> None:
    plan = {step.name: step for step in recipe.plan()}
    assert plan["distilled"].identity["models"][1] == plan["shown_signals"].identity["models"][0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "models.t5.engine=vllm",
            "steps.shown_signals.model: model 't5' is an encoder-decoder, which vLLM does not "
            "serve: set its engine to transformers",
        ),
        (
            "steps.shown_signals.input=documents",
            "steps.shown_signals.input: step 'documents' writes documents, and model 't5' is an "
            "encoder-decoder, which scores demonstrations alone: name a step of that stage, or",
        ),
        (
            "steps.distilled.reader=causal",
            "steps.distilled.reader: 'causal' is no encoder-decoder, and 'shown_signals' was made "
            "by one, of other tokens of each row: name a reader of the teacher's kind",
        ),
        (
            "steps.shown_signals.model=causal",
            "steps.distilled.reader: 't5' is an encoder-decoder, and 'shown_signals' was made by a "
            "causal model, of other tokens of each row",
        ),
        (
            "steps.results.reader=causal",
            "steps.results.reader: 'causal' is no encoder-decoder, and 'shown_signals' was made by",
        ),
        (
            "steps.results.students=[t5]",
            "steps.results.students: model 't5' is an encoder-decoder, expected a causal language "
            "model: an encoder-decoder can be the teacher of demonstrations, and what a distiller",
        ),
        (
            "steps.distilled.student=t5",
            "steps.distilled.student: model 't5' is an encoder-decoder, expected a causal",
        ),
        (
            "steps.distiller={stage: student_init, model: t5, layers: 1}",
            "steps.distiller.model: model 't5' is an encoder-decoder, expected a causal",
        ),
    ],
)
def test_elsewhere_one_line_refuses_it(recipe: TinyRecipe, override: str, message: str) -> None:
    assert message in str(error_of(recipe, override))


def test_another_kind_of_encoder_decoder_is_refused(recipe: TinyRecipe, tmp_path: Path) -> None:
    folder = recipe.root.parent / "t5"
    shutil.copytree(folder, tmp_path / "bart")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "bart" / "config.json").write_text(json.dumps(config | {"model_type": "bart"}))
    said = str(error_of(recipe, f"models.t5.path={tmp_path / 'bart'}"))
    assert "model 't5' is an encoder-decoder of type bart, known are t5 and mt5: name one" in said
