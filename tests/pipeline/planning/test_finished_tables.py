"""Tables that a recipe reads and does not make: imports, and what other recipes made."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.exports.export import export_tables
from schemas.storage.manifest import read_manifest
from tests.fixtures.cached_data import make_cached_data
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    edit_recipe,
    error_of,
    make_recipe,
    stamps,
    table_bytes,
    teachercache,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def named(folder: Path) -> dict[str, str]:
    return {"stage": "finished_table", "folder": str(folder)}


@pytest.mark.slow
def test_what_is_made_of_it_is_what_would_be_made_where_it_came_from(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    """The same names and bytes, in another root, and the table itself untouched."""
    first = make_recipe(tmp_path / "first", tiny_model, paragraphs[:30])
    first.run()
    before = stamps(first.root)
    other = make_recipe(tmp_path / "other", tiny_model, paragraphs[:30])
    edit_recipe(other, "steps", "documents", value=named(first.step("documents").folder))
    events = other.run()
    assert events.states == {"documents": "done", "signals": "pending"}
    made, there = other.step("signals"), first.step("signals")
    assert made.fingerprint == there.fingerprint and made.folder != there.folder
    assert table_bytes(made.folder) == table_bytes(there.folder)
    assert stamps(first.root) == before


@pytest.mark.slow
def test_a_recipe_trains_on_imported_tables(tmp_path: Path) -> None:
    """From rows of axolotl to a student, by the commands alone."""
    data = make_cached_data(tmp_path / "cache")
    export_tables(data.tables("top_k"), "axolotl", tmp_path / "peer", split=None, k=None)
    root = tmp_path / "root"
    asked = ("--from", "axolotl", "--tokenizer", data.teacher)
    said = teachercache("import", tmp_path / "peer", root, *asked)
    assert said.code == 0, said.err
    (documents,), (signals,) = (
        [*(root / name).iterdir()] for name in ("documents", "teacher_logits")
    )
    steps = {
        "documents": named(documents),
        "signals": named(signals),
        "student": {"stage": "student_init", "model": "base", "layers": [0]},
        "distilled": {
            "stage": "train",
            "student": "student",
            "data": ["documents", "signals"],
            "objective": {"loss": "kd", "weight": 0.9},
            "max_steps": 3,
            "per_device_batch_size": 4,
            "lr": 3e-3,
        },
    }
    base = {"path": str(data.student), "dtype": "float32", "engine": "transformers"}
    execution = {"root": str(root)}
    body = {"name": "tiny", "models": {"base": base}, "steps": steps, "execution": execution}
    recipe = TinyRecipe(tmp_path / "recipe.yaml", root)
    recipe.path.write_text(yaml.safe_dump(body, sort_keys=False))
    for command in ("plan", "show", "status"):
        shown = teachercache(command, recipe.path)
        assert shown.code == 0 and "signals" in shown.out, shown.err
    (_, planned, *_) = json.loads(teachercache("plan", recipe.path, "--json").out)
    assert (planned["kind"], planned["state"]) == ("source", "done")
    assert planned["fingerprint"] == read_manifest(signals).fingerprint
    ran = teachercache("run", recipe.path)
    assert ran.code == 0, ran.err
    assert teachercache("train", recipe.path, "--step", "distilled").code == 0
    metrics = json.loads((recipe.step("distilled").folder / "metrics.json").read_text())
    before, after = (metrics[when]["kl_to_teacher"] for when in ("before", "after"))
    assert after < before
    assert teachercache("verify", recipe.path).code == 0


def test_what_is_no_finished_table_is_named_when_planned(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path / "recipe", tiny_model, paragraphs[:30])
    edit_recipe(recipe, "steps", "documents", value=named(tmp_path / "nowhere"))
    assert "steps.documents.folder" in str(error_of(recipe))
    assert "nowhere does not exist" in str(error_of(recipe))
    edit_recipe(recipe, "steps", "documents", value=named(tmp_path))
    assert "holds no table: it has no manifest.json" in str(error_of(recipe))
    data = make_cached_data(tmp_path / "cache")
    edit_recipe(recipe, "steps", "documents", value=named(data.root / "top_k"))
    assert "step 'documents' writes teacher_logits" in str(error_of(recipe))
    edit_recipe(recipe, "steps", "documents", value=named(data.documents))
    assert "holds ids of vocabulary" in str(error_of(recipe))
    manifest = data.documents / "manifest.json"
    body = json.loads(manifest.read_text()) | {"version": 99}
    manifest.write_text(json.dumps(body))
    assert "steps.documents.folder" in str(error_of(recipe)) and "99" in str(error_of(recipe))
