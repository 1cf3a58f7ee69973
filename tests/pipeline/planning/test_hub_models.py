"""Models by hub name, from a hub on loopback: fetched once, by commit, then read from the cache."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.planning.hub_revisions import REVISIONS
from schemas.errors import ConfigError
from tests.conftest import PARAGRAPHS, save_tiny_model
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, make_recipe, teachercache
from tests.servers.hub_server import TOKEN, Hub, hub_server, use_hub

NAME = "someone/tiny"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as served:
        yield served


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """What is pushed: the tiny model, and a file that no model needs."""
    shutil.copytree(tiny_model, tmp_path / "pushed")
    (tmp_path / "pushed" / "flax_model.msgpack").write_bytes(b"of another framework")
    return tmp_path / "pushed"


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> TinyRecipe:
    return make_recipe(tmp_path / "recipe", tiny_model, PARAGRAPHS[:6])


def of_hub(recipe: TinyRecipe, revision: str, name: str = NAME) -> None:
    edit_recipe(recipe, "models", "teacher", "path", value=name)
    edit_recipe(recipe, "models", "teacher", "revision", value=revision)


def refusal(recipe: TinyRecipe) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe.plan()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_a_commit_is_fetched_once_and_named_by_its_content(
    hub: Hub, folder: Path, recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = [step.fingerprint for step in recipe.plan()]
    of_hub(recipe, hub.push(NAME, folder))
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    assert [step.fingerprint for step in recipe.plan()] == local
    assert not any("msgpack" in line for line in hub.asked)
    hub.asked.clear()
    assert recipe.run().finished == ["documents", "signals"]
    use_hub(monkeypatch, hub.url, tmp_path / "hub", offline=True)
    assert teachercache("plan", recipe.path).code == 0
    assert not hub.asked  # what is in the cache is not asked for again
    assert NAME in teachercache("show", recipe.path).out


def test_a_branch_is_looked_up_once_and_written_down(
    hub: Hub, folder: Path, recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.push(NAME, folder)
    of_hub(recipe, "main")
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    before = [step.fingerprint for step in recipe.plan()]
    assert json.loads((recipe.root / REVISIONS).read_text()) == {f"{NAME}@main": first}
    save_tiny_model(folder, vocab_size=600)
    second = hub.push(NAME, folder)
    assert second != first and [step.fingerprint for step in recipe.plan()] == before
    (recipe.root / REVISIONS).unlink()  # whoever wants what the branch is today
    assert [step.fingerprint for step in recipe.plan()] != before
    # A commit that the hub has no more, and that is in no cache.
    shutil.rmtree(tmp_path / "hub")
    del hub.commits[NAME][second]
    hub.branches[NAME]["main"] = first
    assert (
        f"no such revision of it (any more): name another commit or branch; what a branch was "
        f"is written in {REVISIONS}" in refusal(recipe)
    )


def test_what_is_not_there_is_one_line(
    hub: Hub, folder: Path, recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.push(NAME, folder)
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    of_hub(recipe, commit, "someone/else")
    assert "models.teacher: someone/else at revision" in refusal(recipe)
    assert "the hub has no such model, or it is private" in refusal(recipe)
    of_hub(recipe, "no-such-branch")
    assert "the hub has no such revision of it" in refusal(recipe)
    of_hub(recipe, commit, "not a name")
    assert "'not a name' is no local folder and no hub name (owner/name)" in refusal(recipe)
    of_hub(recipe, commit, str(folder))
    assert "is a local folder too, which has none" in refusal(recipe)
    of_hub(recipe, commit)
    use_hub(monkeypatch, hub.url, tmp_path / "empty", offline=True)
    assert "the hub cannot be reached (HF_HUB_OFFLINE is set): fetch it where" in refusal(recipe)
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "empty")
    assert "is not whole in the cache of this machine, and the hub cannot be" in refusal(recipe)


def test_a_torn_download_is_gone_on_with(
    hub: Hub, folder: Path, recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_hub(recipe, hub.push(NAME, folder))
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    hub.broken.add("model.safetensors")
    assert "models.teacher: someone/tiny at revision" in refusal(recipe)
    use_hub(monkeypatch, hub.url, tmp_path / "hub", offline=True)
    assert "is not whole in the cache of this machine" in refusal(recipe)
    hub.broken.clear()
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    assert len(recipe.plan()) == 2


@pytest.mark.slow
def test_a_private_model_takes_the_token_from_its_place_and_nobody_writes_it_down(
    hub: Hub, folder: Path, recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_hub(recipe, hub.push(NAME, folder))
    hub.private.add(NAME)
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    assert "or it is private" in refusal(recipe)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert recipe.run().finished == ["documents", "signals"]
    files = [path for path in recipe.root.rglob("*") if path.is_file()]
    assert files and not any(TOKEN.encode() in path.read_bytes() for path in files)
