"""Whole runs with their root on a real S3 server: the bytes of a local run, whatever happens to it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline import lease_lock
from pipeline.plan import PlannedStep, make_plan
from pipeline.recipe import load_recipe
from pipeline.run import run_plan
from pipeline.step_lock import LOCK_FILE, step_lock
from schemas.errors import StoreError
from schemas.manifest import read_manifest
from schemas.object_store import ObjectPath
from stages.checkpoint import read_checkpoint
from tests.s3_server import (
    KEY_ID,
    PASS,
    SECRET,
    Server,
    faulty_proxy,
    running_server,
    use_endpoint,
)
from tests.tiny_recipe import Events, TinyRecipe, finish, make_recipe, start, teachercache

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
NUM_PARAGRAPHS = 90
STUDENTS = {
    "student": {"stage": "student_init", "model": "teacher", "layers": 2},
    "trained": {
        "stage": "train",
        "student": "student",
        "data": ["documents", "signals"],
        "objective": {"loss": "kd", "weight": 0.9},
        "max_steps": 6,
        "per_device_batch_size": 4,
        "save_steps": 2,
    },
    "measured": {
        "stage": "evaluate",
        "students": ["student", "trained"],
        "data": ["documents", "signals"],
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture(autouse=True)
def machine(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has this store's credentials, and nothing in its cache yet."""
    use_endpoint(monkeypatch, server.url)
    monkeypatch.setenv("TEACHERCACHE_CACHE", str(tmp_path / "machine"))


@pytest.fixture(scope="module")
def local(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """The recipe, with students, run whole on a local root."""
    folder = tmp_path_factory.mktemp("local")
    recipe = make_recipe(folder, tiny_model, paragraphs[:NUM_PARAGRAPHS], more_steps=STUDENTS)
    recipe.run()
    return recipe


@pytest.fixture
def root(server: Server, machine: None) -> str:
    return server.new_root()


def on_store(recipe: TinyRecipe, root: str, folder: Path, *names: str) -> TinyRecipe:
    """Return the recipe with its root in the store, or only these steps of it."""
    body = yaml.safe_load(recipe.path.read_text())
    body["execution"]["root"] = root
    body["steps"] = {name: body["steps"][name] for name in names or body["steps"]}
    path = folder / "store.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return TinyRecipe(path, folder)


def tables(recipe: TinyRecipe) -> dict[str, tuple[str, list[str]]]:
    """What has to be equal: the data set's id and each shard's checksum."""
    found = {}
    for step in recipe.plan():
        if step.writes_table:
            manifest = read_manifest(step.place)
            found[step.name] = (manifest.dataset_id, [shard.sha256 for shard in manifest.shards])
    return found


def losses(step: PlannedStep) -> list[float]:
    record = read_checkpoint(step.place)
    assert record is not None
    return [entry["loss"] for entry in record.history]


def test_a_run_on_a_store_is_a_local_run(
    local: TinyRecipe, root: str, server: Server, tmp_path: Path
) -> None:
    recipe = on_store(local, root, tmp_path)
    events = recipe.run()
    assert set(events.states.values()) == {"pending"} and len(events.finished) == 5
    here, there = local.plan(), recipe.plan()
    assert [step.fingerprint for step in here] == [step.fingerprint for step in there]
    assert tables(recipe) == {name: t for name, t in tables(local).items()}
    for ours, theirs in zip(here, there, strict=True):
        if ours.writes_table:
            manifest = (ours.folder / "manifest.json").read_bytes()
            assert (theirs.place / "manifest.json").read_bytes() == manifest
    for name in ("student", "trained"):
        ours, theirs = (read_checkpoint(r.step(name).place) for r in (local, recipe))
        assert ours is not None and theirs is not None
        weights = [record.files["model.safetensors"] for record in (ours, theirs)]
        assert weights[0] == weights[1]
    assert losses(recipe.step("trained")) == losses(local.step("trained"))
    # Nothing is made again, and nothing is left behind: no lock, no part, no scratch folder.
    again = recipe.run()
    assert set(again.states.values()) == {"done"} and not again.made
    objects = server.objects(root)
    assert not server.uploads(root) and not [key for key in objects if LOCK_FILE in key]
    assert not list((tmp_path / "machine" / "work").iterdir())
    # Credentials are in no object and in no file that the run left on this machine.
    written = [*objects.values(), *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())]
    assert not [1 for body in written if KEY_ID.encode() in body or SECRET.encode() in body]
