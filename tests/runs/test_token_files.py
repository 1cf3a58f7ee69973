"""Token files through whole runs: killed, shared out, on Ray, and a student trained from them."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import pipeline.steps.repeated_rows
from pipeline.executors.shard_task import write_output
from pipeline.planning.recipe import Execution
from pipeline.steps.run import run_shards
from schemas.storage.manifest import read_manifest
from tests.fixtures.tiny_recipe import Events, TinyRecipe, finish, start, table_bytes, teachercache
from tests.fixtures.token_file_kinds import some_ids, token_recipe, write_tokens
from tests.servers.ray_cluster import ENVIRONMENT, ray_cluster

os.environ.update(ENVIRONMENT)  # read by Ray when it is imported

pytestmark = pytest.mark.usefixtures("own_cache")


def made(recipe: TinyRecipe) -> dict[str, bytes]:
    return table_bytes(recipe.step("ids").folder)


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Any]:
    """Three files; rows of the first stand in the others again."""
    rows = some_ids(90)
    for name, part in (("a", rows[:40]), ("b", rows[10:70]), ("c", rows[60:])):
        write_tokens(tmp_path / "files", "megatron", part, name)
    return {"kind": "megatron", "paths": [str(tmp_path / "files" / "*.idx")]}


@pytest.fixture
def undisturbed(source: dict[str, Any], tiny_model: Path, tmp_path: Path) -> dict[str, bytes]:
    recipe = token_recipe(tmp_path / "alone", tiny_model, source, rows_per_shard=4)
    recipe.run()
    return made(recipe)


@pytest.fixture
def again(source: dict[str, Any], tiny_model: Path, tmp_path: Path) -> TinyRecipe:
    return token_recipe(tmp_path / "again", tiny_model, source, rows_per_shard=4)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stood(
    undisturbed: dict[str, bytes], again: TinyRecipe
) -> None:
    process = start("run", again.path)
    folder = again.step("ids").folder
    while len(list(folder.glob("shard-*.json"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    kept = len(list(folder.glob("shard-*.json")))
    events = again.run()
    assert events.found and events.found[0] >= min(kept, 3)
    assert made(again) == undisturbed


def test_a_run_killed_while_it_leaves_out_repeated_rows(
    undisturbed: dict[str, bytes], again: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []

    def killed_at_the_third(*arguments: Any, **options: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments)
        return write_output(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.steps.repeated_rows, "write_output", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            again.run()
    events = again.run()
    assert not events.made, "all shards were there"
    assert made(again) == undisturbed


def test_shards_made_in_groups_have_the_bytes_of_one_run(
    undisturbed: dict[str, bytes], again: TinyRecipe
) -> None:
    step = again.step("ids")
    num_shards = len(step.stage.pieces())  # type: ignore[union-attr]
    for shards in (range(5, num_shards), range(5)):
        run_shards(step, shards, Execution(root=again.root), Events())
    assert not again.run().made
    assert made(again) == undisturbed


def test_plan_and_status_tell_shards_rows_and_rejects(again: TinyRecipe) -> None:
    planned = teachercache("plan", again.path)
    assert planned.code == 0 and "130" in planned.out and "about" in planned.out
    again.run()
    rejects = read_manifest(again.step("ids").folder).rejects
    assert sum(rejects.values()) == 40 and rejects["duplicate_of_earlier_shard"] > 20
    assert teachercache("status", again.path).code == 0
    assert teachercache("verify", again.root).code == 0
    assert "token_files -> documents" in teachercache("show", again.path).out


def test_airflow_maps_it_over_groups_of_shards(again: TinyRecipe) -> None:
    (step,) = json.loads(teachercache("plan", again.path, "--json").out)
    assert step["kind"] == "table" and step["groups"] and step["num_shards"] > 16


@pytest.mark.slow
def test_two_workers_here_or_on_ray_write_the_bytes_of_one_process(
    undisturbed: dict[str, bytes], source: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    with ray_cluster(num_cpus=2, num_gpus=0, env={"OMP_NUM_THREADS": "1"}) as cluster:
        for name, settings in (
            ("local", ()),
            ("ray", ("execution.executor=ray", f"execution.address={cluster.address}")),
        ):
            recipe = token_recipe(tmp_path / name, tiny_model, source, rows_per_shard=4)
            events = recipe.run("execution.workers=2", *settings)
            assert made(recipe) == undisturbed, name
            assert not events.warnings


@pytest.mark.slow
@pytest.mark.parametrize("what", ["documents", "conversations"])
def test_a_student_learns_from_token_files(what: str, tiny_model: Path, tmp_path: Path) -> None:
    rows = some_ids(48)
    mask: dict[str, Any] = {"loss_mask": [[0] + [1] * (len(row) - 1) for row in rows]}
    columns = mask if what == "conversations" else {}
    path = write_tokens(tmp_path, "parquet", rows, **columns)
    source = {"kind": "parquet", "paths": [str(path)]}
    source |= {"mask": "loss_mask"} if what == "conversations" else {}
    steps = {
        "signals": {
            "stage": "teacher_logits",
            "input": "ids",
            "model": "teacher",
            "encoding": {"kind": "threshold", "k": 8},
        },
        "student": {"stage": "student_init", "model": "teacher", "layers": 2},
        "distilled": {
            "stage": "train",
            "student": "student",
            "data": ["ids", "signals"],
            "objective": {"loss": "kd", "weight": 0.9},
            "max_steps": 2,
        },
    }
    recipe = token_recipe(tmp_path, tiny_model, source, steps)
    recipe.run()
    ids, signals = (read_manifest(recipe.step(name).folder) for name in ("ids", "signals"))
    assert ids.table == what and signals.num_rows == ids.num_rows == len(rows)
    assert signals.num_positions == sum(len(row) - 1 for row in rows)
    assert (recipe.step("distilled").folder / "checkpoint.json").is_file()
