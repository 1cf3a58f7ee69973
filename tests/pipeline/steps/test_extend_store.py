"""``teachercache extend`` where the root is in an object store: the bytes of a local extension."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.steps import extension
from schemas.storage.manifest import read_manifest
from schemas.storage.object_path import ObjectPath
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, make_recipe, teachercache
from tests.pipeline.steps.test_extend import extend, with_texts
from tests.servers.s3_server import Server, running_server, use_endpoint

STEP = "signals"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def in_store(
    server: Server,
    tiny_model: Path,
    paragraphs: list[str],
    tmp_path: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> TinyRecipe:
    """A recipe with its root in the store, run there, and then given three texts more."""
    use_endpoint(monkeypatch, server.url)
    (tmp_path / "store").mkdir()
    recipe = make_recipe(tmp_path / "store", tiny_model, paragraphs[:20])
    edit_recipe(recipe, "steps", "documents", "mode", value="truncate")
    edit_recipe(recipe, "execution", "root", value=server.new_root())
    recipe.run()
    with_texts(recipe, paragraphs[:23])
    return recipe


def stop_in_the_middle(recipe: TinyRecipe) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def killed(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(extension, "_put_together", killed)
        with pytest.raises(KeyboardInterrupt):
            extend(recipe)


@pytest.mark.slow
def test_an_extension_in_a_store_has_the_bytes_of_one_here(
    in_store: TinyRecipe, paragraphs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder of shards is listed to find what can be copied, whatever lies in it."""
    listed: list[str] = []
    find = ObjectPath.find

    def noted(self: ObjectPath) -> dict[ObjectPath, int]:
        listed.append(self.url)
        return find(self)

    here = TinyRecipe(tmp_path / "here.yaml", tmp_path / "here")
    shutil.copy(in_store.path, here.path)
    edit_recipe(here, "execution", "root", value=str(here.root))
    with_texts(here, paragraphs[:20])
    here.run()
    with_texts(here, paragraphs[:23])
    extend(here)
    monkeypatch.setattr(ObjectPath, "find", noted)
    events = extend(in_store)
    assert any("3 of 23 rows are new" in line for line in events.lines)
    place = in_store.step(STEP).place
    assert {url for url in listed if "/teacher_logits" in url} == {f"{place}/.extend"}
    ours, theirs = read_manifest(place), read_manifest(here.step(STEP).place)
    assert ours == theirs and ours.dataset_id == theirs.dataset_id
    assert isinstance(place, ObjectPath) and not (place / ".extend").find()
    said = teachercache("verify", str(place))
    assert said.code == 0, said.out + said.err


@pytest.mark.slow
def test_what_an_extension_begun_in_a_store_copies_is_needed(in_store: TinyRecipe) -> None:
    stop_in_the_middle(in_store)
    root = str(in_store.load().execution.root)
    clean = ("gc", root, "--keep", in_store.path, "--delete")
    said = teachercache(*clean)
    assert said.code == 0 and "4 folders kept" in said.out, said.out + said.err
    events = extend(in_store)
    assert any("3 of 23 rows are new" in line for line in events.lines)
    said = teachercache(*clean)
    assert said.code == 0 and "2 folders kept" in said.out, said.out + said.err
    place = in_store.step(STEP).place
    assert read_manifest(place).num_rows == 23
    assert teachercache("verify", str(place)).code == 0
