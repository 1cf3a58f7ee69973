"""A recipe with the default encoding, whose number of entries follows the position, run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.dataset import open_dataset
from schemas.distribution import weighted_tokens
from schemas.storage.manifest import MANIFEST, read_manifest
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, make_recipe, teachercache

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
ENCODING = "steps.signals.encoding"


@pytest.fixture(scope="module")
def recipe(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    recipe = make_recipe(tmp_path_factory.mktemp("tau"), tiny_model, paragraphs[:40])
    edit_recipe(recipe, "steps", "signals", "encoding", value={"kind": "threshold"})
    recipe.run()
    return recipe


def test_a_shard_made_alone_has_the_bytes_it_had(recipe: TinyRecipe, tmp_path: Path) -> None:
    other = recipe.copy(tmp_path)
    here, there = (each.step("signals").folder for each in (recipe, other))
    name = sorted(there.glob("shard-*.arrow"))[1].stem
    for path in (*there.glob(f"{name}*"), there / MANIFEST):
        path.unlink()
    assert other.run().made == [name]
    for shard in here.glob("shard-*.arrow"):
        assert shard.read_bytes() == (there / shard.name).read_bytes()
    assert teachercache("verify", there).code == 0


def test_the_table_says_its_tau_and_reads_as_weights(recipe: TinyRecipe) -> None:
    documents, signals = (recipe.step(name).folder for name in ("documents", "signals"))
    manifest = read_manifest(signals)
    expected = {"kind": "threshold", "tau": 0.04, "max_k": 64}
    assert manifest.variant == "threshold_tau"
    assert manifest.identity["config"]["encoding"] == expected
    about = json.loads((signals / "schema.json").read_text())
    assert about["settings"]["encoding"] == expected and about["sizes"] == {}
    rows: Any = open_dataset([documents, signals])
    for index in range(len(rows)):
        ids_PK, weights_PK = weighted_tokens(rows[index])
        assert ids_PK.max() < manifest.vocab_size and ids_PK.shape[1] <= 25
        np.testing.assert_allclose(weights_PK.sum(axis=1), 1.0, atol=1e-5)


def test_the_packed_layout_has_the_rows_of_the_plain_one(
    recipe: TinyRecipe, tmp_path: Path
) -> None:
    packed = "steps.signals.encoding.layout=packed"
    other = recipe.copy(tmp_path)
    other.run(packed)
    plain, there = recipe.step("signals").folder, other.step("signals", packed).folder
    assert plain.name != there.name and teachercache("verify", there).code == 0
    documents = recipe.step("documents").folder
    here, packed_rows = (open_dataset([documents, folder]) for folder in (plain, there))
    for index in range(len(here)):
        for name, values in here[index].items():
            np.testing.assert_array_equal(values, packed_rows[index][name])
    said = teachercache("plan", recipe.path, "--set", packed, "--set", f"{ENCODING}.k=8")
    assert said.code == 2 and "layout packed stores entries by tau, and k is 8" in said.error


def test_k_beside_tau_is_refused_in_one_line(recipe: TinyRecipe) -> None:
    settings = ("steps.signals.encoding.tau=0.1", "steps.signals.encoding.k=8")
    said = teachercache("plan", recipe.path, *(part for s in settings for part in ("--set", s)))
    assert said.code == 2 and "k is 8 beside tau, mean_k or max_k" in said.error
    fixed = recipe.plan("steps.signals.encoding.k=8")
    assert fixed[1].identity["config"]["encoding"] == {"kind": "threshold", "k": 8}
