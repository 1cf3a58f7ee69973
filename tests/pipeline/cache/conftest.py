"""A recipe with all kinds of steps, run once for the tests of this folder; each has a copy."""

from pathlib import Path

import pytest

from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe

TRAIN = {"stage": "train", "student": "student", "max_steps": 2, "per_device_batch_size": 4}
MORE_STEPS = {
    "states": {
        "stage": "teacher_logits",
        "input": "documents",
        "model": "teacher",
        "encoding": {"kind": "exact"},
    },
    "student": {"stage": "student_init", "model": "teacher", "layers": [0]},
    "distilled": {**TRAIN, "data": ["documents", "signals"], "objective": {"loss": "kd"}},
    "results": {"stage": "evaluate", "students": ["distilled"], "data": ["documents", "signals"]},
}


@pytest.fixture(scope="session")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder, tiny_model, paragraphs[:30], more_steps=MORE_STEPS)
    recipe.run()
    return recipe


@pytest.fixture
def copied(finished: TinyRecipe, tmp_path: Path, own_cache: Path) -> TinyRecipe:
    return finished.copy(tmp_path / "copied")
