"""A recipe with ``mean_k``, run: one tau, whoever makes which shards when."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.dataset import open_dataset
from schemas.storage.manifest import MANIFEST, read_manifest
from stages.signals.teacher_logits.calibration import CALIBRATION, read_calibration
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    edit_recipe,
    finish,
    make_recipe,
    start,
    table_bytes,
    teachercache,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
MEAN_K = 7.5


@pytest.fixture(scope="module")
def recipe(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """The recipe run by one process, with a teacher that is sure here and unsure there."""
    folder = tmp_path_factory.mktemp("mean_k")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.norm.weight.data *= 4.0
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "model")
    recipe = make_recipe(folder, folder / "model", paragraphs[:40])
    edit_recipe(recipe, "steps", "signals", "encoding", value={"mean_k": MEAN_K})
    edit_recipe(recipe, "steps", "signals", "encoding", "kind", value="threshold")
    recipe.run()
    return recipe


@pytest.fixture
def begun(recipe: TinyRecipe, tmp_path: Path) -> TinyRecipe:
    """The same with its documents alone."""
    return recipe.copy(tmp_path, without="teacher_logits")


def signals(recipe: TinyRecipe) -> Path:
    return recipe.step("signals").folder


def tau_of(recipe: TinyRecipe) -> float:
    found = read_calibration(signals(recipe))
    assert found is not None
    return found.tau


def test_the_table_has_so_many_entries_and_all_say_its_tau(recipe: TinyRecipe) -> None:
    folder, tau = signals(recipe), tau_of(recipe)
    rows: Any = open_dataset([recipe.step("documents").folder, folder])
    counts = [rows[i]["num_head_P"].astype(int) + rows[i]["num_tail_P"] for i in range(len(rows))]
    per_position = np.concatenate(counts)
    assert per_position.std() > 3 and per_position.mean() == pytest.approx(MEAN_K, rel=0.01)
    found = json.loads((folder / CALIBRATION).read_text())
    assert found["num_positions"] >= 4096 > found["num_positions"] - 47
    assert found["mean_entries"] == pytest.approx(MEAN_K, rel=1e-3)
    manifest = read_manifest(folder)
    assert [*manifest.files] == [CALIBRATION]
    assert manifest.identity["config"]["encoding"]["mean_k"] == MEAN_K
    for record in folder.glob("shard-*.json"):
        assert json.loads(record.read_text())["notes"]["tau"] == tau
    said = f"tau {tau:g}"
    assert f"signals: {said}, 7.5" in teachercache("status", recipe.path).out
    assert f"(v1, threshold_tau), {said} from" in " ".join(
        teachercache("show", recipe.path).out.split()
    )
    assert said in teachercache("inspect", folder).out.splitlines()[0]
    assert teachercache("verify", folder).code == 0


def test_rows_are_those_of_a_recipe_that_names_the_tau(
    recipe: TinyRecipe, begun: TinyRecipe
) -> None:
    encoding = f"steps.signals.encoding={{kind: threshold, tau: {tau_of(recipe)}}}"
    begun.run(encoding)
    named = begun.step("signals", encoding).folder
    assert named.name != signals(recipe).name
    shards = sorted(named.glob("shard-*.arrow"))
    assert len(shards) > 4
    for shard in shards:
        assert shard.read_bytes() == (signals(recipe) / shard.name).read_bytes()


def test_runs_of_some_shards_at_once_and_one_killed_take_one_tau(
    recipe: TinyRecipe, begun: TinyRecipe
) -> None:
    """As Airflow's mapped tasks do; no run of shard 0 is there to find tau, the killed one has."""
    num_shards = len(read_manifest(signals(recipe)).shards)
    middle = num_shards // 2
    groups = (f"{middle}:{num_shards - 1}", f"{num_shards - 1}:{num_shards}")
    command = ("run", begun.path, "--step", "signals", "--shards")
    killed, other = (start(*command, group) for group in groups)
    while killed.poll() is None and not (signals(begun) / CALIBRATION).exists():
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    said = finish(other)
    assert said.code == 0, said.err
    assert tau_of(begun) == tau_of(recipe)
    found = (signals(begun) / CALIBRATION).stat()
    assert not (signals(begun) / MANIFEST).exists()
    assert teachercache("run", begun.path).code == 0
    assert os.path.samestat(found, (signals(begun) / CALIBRATION).stat())
    assert table_bytes(signals(begun)) == table_bytes(signals(recipe))


def test_a_tau_that_was_found_is_never_found_again(recipe: TinyRecipe, begun: TinyRecipe) -> None:
    """As where a run was killed after it had found tau, on a machine that found another one."""
    folder = signals(begun)
    folder.mkdir(parents=True)
    found = json.loads((signals(recipe) / CALIBRATION).read_text())
    other = json.dumps(found | {"tau": 0.2})
    (folder / CALIBRATION).write_text(other)
    begun.run()
    assert (folder / CALIBRATION).read_text() == other
    expected = begun.copy(begun.root.parent / "named", without="teacher_logits")
    encoding = "steps.signals.encoding={kind: threshold, tau: 0.2}"
    expected.run(encoding)
    named = expected.step("signals", encoding).folder
    for shard in folder.glob("shard-*.arrow"):
        assert shard.read_bytes() == (named / shard.name).read_bytes()


def test_a_file_that_has_gone_is_written_again_as_it_was(
    recipe: TinyRecipe, tmp_path: Path
) -> None:
    own = recipe.copy(tmp_path)
    for name in (CALIBRATION, MANIFEST):
        (signals(own) / name).unlink()
    assert not own.run().made
    assert table_bytes(signals(own)) == table_bytes(signals(recipe))


def test_shards_of_two_taus_are_no_table(recipe: TinyRecipe, tmp_path: Path) -> None:
    own = recipe.copy(tmp_path)
    record = sorted(signals(own).glob("shard-*.json"))[2]
    body = json.loads(record.read_text())
    body["notes"]["tau"] = 0.3
    record.write_text(json.dumps(body))
    line = f"{record.stem}.arrow was made with tau 0.3, calibration.json says {tau_of(own)}"
    said = teachercache("verify", signals(own))
    assert said.code == 1 and line in said.out
    (signals(own) / MANIFEST).unlink()
    said = teachercache("run", own.path)
    assert said.code == 1 and f"{line}: a table has one tau; delete the .json" in said.error
    assert not (signals(own) / MANIFEST).exists()
    record.unlink()
    assert teachercache("run", own.path).code == 0
    assert table_bytes(signals(own)) == table_bytes(signals(recipe))


def test_what_cannot_be_reached_is_one_line(begun: TinyRecipe) -> None:
    settings = "steps.signals.encoding={kind: threshold, mean_k: 250, max_k: 255}"
    said = teachercache("run", begun.path, "--set", settings)
    assert said.code == 2 and "encoding.mean_k is 250, but the first 4," in said.error
    place = begun.step("signals", settings).folder
    assert not [path for path in place.iterdir() if path.name != ".lock"]
    shutil.rmtree(place)
    said = teachercache("plan", begun.path, "--set", "steps.signals.encoding.tau=0.1")
    assert said.code == 2 and "mean_k is 7.5 beside tau 0.1" in said.error
    short = "execution.engine.max_model_len=16"
    said = teachercache("run", begun.path, "--set", short)
    assert said.code == 2 and "max_model_len" in said.error
