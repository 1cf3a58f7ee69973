"""Tables on a hub on loopback: published whole, fetched by name, read as they were here."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.hub.fetch import fetch
from pipeline.hub.publish import publish
from schemas import open_dataset
from schemas.errors import ConfigError, StoreError, TeacherCacheError
from tests.conftest import PARAGRAPHS
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, teachercache
from tests.servers.hub_server import TOKEN, Hub, hub_server, use_hub

pytestmark = pytest.mark.slow

NAME = "someone/signals"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as served:
        use_hub(monkeypatch, served.url, tmp_path / "hub")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    recipe = make_recipe(tmp_path_factory.mktemp("published"), tiny_model, PARAGRAPHS[:12])
    recipe.run()
    return recipe


@pytest.fixture
def tables(finished: TinyRecipe, tmp_path: Path) -> list[Path]:
    """Folders of the documents and of the teacher's signals about them."""
    copied = finished.copy(tmp_path / "copied")
    return [step.folder for step in copied.plan() if step.writes_table]


def published(folders: list[Path], **changes: object) -> str:
    settings = {"private": False, "licence": "cc-by-4.0", "teacher": "someone/tiny-teacher"}
    return publish(NAME, folders, **(settings | changes)).commit  # type: ignore[arg-type]


def refusal(folders: list[Path]) -> TeacherCacheError:
    with pytest.raises(TeacherCacheError) as caught:
        published(folders)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return caught.value


def test_tables_come_back_by_name_as_they_were(
    hub: Hub, tables: list[Path], tmp_path: Path
) -> None:
    commit = published(tables)
    places = fetch(NAME, tmp_path / "data", revision=commit)
    assert [f"{place.parent.name}/{place.name}" for place in places] == [
        f"{place.parent.name}/{place.name}" for place in tables
    ]
    ours, theirs = open_dataset(tables, split="train"), open_dataset(places, split="train")
    assert len(ours) == len(theirs) > 0
    for index in range(len(ours)):
        for name, value in ours[index].items():
            assert np.array_equal(value, theirs[index][name]), name
    assert teachercache("verify", str(tmp_path / "data")).code == 0
    assert not (tmp_path / "data.unfinished").exists()


def test_nothing_of_this_machine_goes_up(hub: Hub, tables: list[Path], tmp_path: Path) -> None:
    (tables[0] / "source.rejects.jsonl").write_text(json.dumps({"place": str(tmp_path)}) + "\n")
    published(tables)
    _, files = hub.find(f"datasets/{NAME}", "main") or ("", {})
    written = b"".join(files.values())
    assert str(tmp_path).encode() not in written and TOKEN.encode() not in written
    assert not [file for file in files if "rejects" in file or file.endswith("00.json")]


def test_the_card_says_what_the_tables_are(hub: Hub, tables: list[Path]) -> None:
    published(tables)
    _, files = hub.find(f"datasets/{NAME}", "main") or ("", {})
    _, front, text = files["README.md"].decode().split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["license"] == "cc-by-4.0"
    signals = next(one for one in head["configs"] if one["config_name"].startswith("teacher_"))
    splits = {part["split"]: part["path"] for part in signals["data_files"]}
    assert set(splits) == {"train", "heldout"}
    assert {path for paths in splits.values() for path in paths} == {
        file for file in files if file.startswith("teacher_logits/") and file.endswith(".arrow")
    }
    weights = json.loads((tables[1] / "manifest.json").read_text())["identity"]["models"][0]
    assert all(digest in text for digest in weights["weights"].values())
    assert head["teacher"] == "someone/tiny-teacher" and "kind threshold" in text


def test_the_front_matter_serves_the_datasets_library(
    hub: Hub, tables: list[Path], tmp_path: Path
) -> None:
    import datasets

    published(tables)
    fetch(NAME, tmp_path / "data", revision=None)
    rows = datasets.load_dataset(
        str(tmp_path / "data"),
        f"documents-{tables[0].name}",
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    ours = open_dataset(tables[:1], split="train")
    assert rows["sample_id"][:] == [ours[index]["sample_id"] for index in range(len(ours))]


def test_again_is_no_commit_and_another_table_joins_the_card(hub: Hub, tables: list[Path]) -> None:
    first = published(tables[:1])
    assert published(tables[:1]) == first
    assert published(tables[1:], licence=None, teacher=None) != first
    _, files = hub.find(f"datasets/{NAME}", "main") or ("", {})
    card = files["README.md"].decode()
    assert "license: cc-by-4.0\nteacher: someone/tiny-teacher\n" in card
    assert all(f"`{place.parent.name}/{place.name}`" in card for place in tables)


def test_an_upload_that_broke_goes_on_and_commits_once(hub: Hub, tables: list[Path]) -> None:
    hub.breaks_after = 2
    sent = {published(tables)}  # huggingface_hub tries the broken one again
    assert len(hub.commits[f"datasets/{NAME}"]) == 2  # of nothing, and of all
    puts = [line for line in hub.asked if line.startswith("PUT")]
    assert len(puts) == len(hub.large) + 1
    hub.asked.clear()
    assert sent == {published(tables)}
    assert not [line for line in hub.asked if line.startswith("PUT")]


def test_private_is_read_with_a_token_alone(
    hub: Hub, tables: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(tables, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="has no such data set, or it is private"):
        fetch(NAME, tmp_path / "data", revision=None)


def test_what_cannot_be_published_is_one_line(
    hub: Hub, tables: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses_writing = True
    assert "refuses it to this token (403)" in str(refusal(tables))
    monkeypatch.delenv("HF_TOKEN")
    assert "log in" in str(refusal(tables))
    shard = next(tables[1].glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert isinstance(refusal(tables), StoreError)
    with pytest.raises(ConfigError, match="is no hub name: expected owner/name"):
        publish("a/b/c", tables[:1], private=False, licence=None, teacher=None)


def test_what_cannot_be_fetched_is_one_line(hub: Hub, tables: list[Path], tmp_path: Path) -> None:
    published(tables)
    with pytest.raises(ConfigError, match="has no such revision"):
        fetch(NAME, tmp_path / "data", revision="v9")
    with pytest.raises(ConfigError, match="has no such data set"):
        fetch("someone/else", tmp_path / "data", revision=None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    hub.push("datasets/someone/model", tmp_path / "model")
    with pytest.raises(ConfigError, match="has no table of teachercache"):
        fetch("someone/model", tmp_path / "data", revision=None)
    with pytest.raises(ConfigError, match="is there already"):
        fetch(NAME, tmp_path, revision=None)


def test_the_commands(hub: Hub, tables: list[Path], tmp_path: Path) -> None:
    done = teachercache("publish", NAME, *map(str, tables), "--license", "mit")
    assert done.code == 0 and f"/datasets/{NAME}: " in done.out
    fetched = teachercache("fetch", NAME, str(tmp_path / "data"))
    assert fetched.code == 0 and fetched.out.count(": ok") == 2
