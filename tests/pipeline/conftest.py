"""A recipe with all kinds of steps, run once a session; who changes its files takes a copy."""

from pathlib import Path

import pytest

from tests.fixtures.tiny_recipe import EVERY_KIND, TinyRecipe, make_recipe


@pytest.fixture(scope="session")
def every_kind(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    folder = tmp_path_factory.mktemp("every_kind")
    recipe = make_recipe(folder, tiny_model, paragraphs[:30], more_steps=EVERY_KIND)
    recipe.run()
    return recipe
