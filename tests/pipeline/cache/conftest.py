"""The recipe with all kinds of steps, finished: each test of this folder has a copy."""

from pathlib import Path

import pytest

from tests.fixtures.tiny_recipe import TinyRecipe


@pytest.fixture
def copied(every_kind: TinyRecipe, tmp_path: Path, own_cache: Path) -> TinyRecipe:
    return every_kind.copy(tmp_path / "copied")
