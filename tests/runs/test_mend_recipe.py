"""MEND as a recipe on a tiny model: what is read, the teacher over it, and what is trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.dataset import open_dataset
from schemas.scored_spans import span_targets
from schemas.storage.manifest import read_manifest
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, stamps, teachercache

STEPS: dict[str, Any] = {
    "shown": {"stage": "demonstrations", "input": "documents"},
    "shown_signals": {
        "stage": "teacher_logits",
        "input": "shown",
        "model": "teacher",
        "encoding": {"kind": "exact"},
    },
}


@pytest.fixture(scope="module")
def recipe(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    folder = tmp_path_factory.mktemp("mend")
    return make_recipe(folder, tiny_model, paragraphs[:20], more_steps=STEPS)


def test_a_step_without_a_model_is_a_step_like_any_other(recipe: TinyRecipe) -> None:
    """Planned, run, joined with its signals, verified; a second run changes nothing."""
    assert "pending" in teachercache("plan", recipe.path).out
    said = teachercache("run", recipe.path)
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
    assert set(recipe.run().states.values()) == {"done"}
    assert stamps(recipe.root) == before
    assert teachercache("verify", recipe.root).code == 0
    shown_rows = teachercache("inspect", shown, "--rows", "1")
    assert shown_rows.code == 0 and "distiller_ids_L" in shown_rows.out
    assert np.isfinite(row["entropies_P"]).all()


def test_another_budget_is_another_table(recipe: TinyRecipe) -> None:
    names = [
        recipe.step("shown_signals", f"steps.shown.distiller_tokens={n}").fingerprint
        for n in (500, 501)
    ]
    assert len({*names, recipe.step("shown_signals").fingerprint}) == 3
