"""Data sets by hub name, on loopback: a branch is one commit, files are fetched once."""

import errno
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from pipeline.planning.hub_revisions import REVISIONS
from schemas.errors import ConfigError, StoreError
from schemas.storage.manifest import read_manifest
from stages.sources.reading.records import read_records
from stages.sources.reading.rejects import Rejects
from stages.sources.reading.source import HubData
from tests.conftest import PARAGRAPHS, save_tiny_model
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe
from tests.servers.hub_server import TOKEN, Hub, hub_server, use_hub
from tests.stages.sources.test_conversations import said
from tests.stages.sources.test_preference_pairs import CHATML

NAME = "someone/rows"
REPOSITORY = f"datasets/{NAME}"
CARD = """---
configs:
- {config_name: texts, data_files: [{split: train, path: texts/part-*.parquet}]}
- config_name: chats
  data_files:
  - {split: test, path: chats/test.parquet}
  - {split: train, path: "chats/a[[]1].parquet"}
- {config_name: pairs, data_files: pairs.parquet}
- {config_name: facts, data_files: facts.parquet}
---
"""
FILES = {
    "texts": ["texts/part-0.parquet", "texts/part-1.parquet"],
    "chats": ["chats/a[1].parquet"],
    "pairs": ["pairs.parquet"],
    "facts": ["facts.parquet"],
}
SPLIT = {"tokenizer": "teacher", "heldout_fraction": 0.3}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as served:
        yield served


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_tiny_model(tmp_path_factory.mktemp("model") / "chat", vocab_size=640)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    marks = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer.add_special_tokens(marks)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is pushed: four configurations, as the sources read them."""
    pushed = tmp_path / "pushed"
    for name in ("texts", "chats"):
        (pushed / name).mkdir(parents=True)
    (pushed / "README.md").write_text(CARD)

    def write(file: str, rows: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(rows), pushed / file)

    words = [paragraph.split() for paragraph in PARAGRAPHS]
    for part in range(2):
        texts = PARAGRAPHS[6 * part : 6 * part + 6]
        write(f"texts/part-{part}.parquet", [{"text": text} for text in texts])
    chats = [{"messages": said(*(" ".join(text[n : n + 4]) for n in (0, 4)))} for text in words]
    write("chats/a[1].parquet", chats)
    write("chats/test.parquet", chats[:1])
    parts = ("prompt", "chosen", "rejected")
    pairs = [{part: " ".join(text[4 * n :][:4]) for n, part in enumerate(parts)} for text in words]
    write("pairs.parquet", pairs)
    write("facts.parquet", [{"q": " ".join(text[:5]), "a": text[5]} for text in words])
    return pushed


def steps(source_of: Any) -> dict[str, Any]:
    """One step of each stage that reads records."""
    table = {
        "kind": "rows",
        "name": "facts",
        "task_kind": "generation",
        "input": "q",
        "output": "a",
    }
    return {
        "texts": {
            "stage": "ingest",
            "source": source_of("texts"),
            "length": 24,
            "mode": "pack",
            **SPLIT,
        },
        "chats": {
            "stage": "conversations",
            "source": source_of("chats"),
            "max_length": 160,
            **SPLIT,
        },
        "pairs": {
            "stage": "preference_pairs",
            "source": source_of("pairs"),
            "max_prompt_length": 80,
            "max_response_length": 80,
            **SPLIT,
        },
        "facts": {
            "stage": "episodes",
            "sources": [table | {"source": source_of("facts")}],
            "targets": ["facts"],
            "paradigm": "multitask",
            "demonstrations": 1,
            "draw": "resample",
            "support": 4,
            "max_length": 64,
            "tokenizer": "teacher",
        },
    }


def of_hub(revision: str = "main", **changes: Any) -> Any:
    return lambda config: (
        {"kind": "hub", "name": NAME, "revision": revision, "config": config, "split": "train"}
        | changes
    )


def recipe_of(place: Path, model: Path, source_of: Any, *names: str) -> TinyRecipe:
    made = make_recipe(place, model, PARAGRAPHS[:2], more_steps=steps(source_of))
    return made.only(*(names or FILES))


def shards_of(recipe: TinyRecipe) -> dict[str, list[str]]:
    """The checksums of each table's shards."""
    tables = {step.name: read_manifest(step.folder) for step in recipe.plan()}
    return {name: [shard.sha256 for shard in table.shards] for name, table in tables.items()}


def refusal(recipe: TinyRecipe, *, when_run: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe.run() if when_run else recipe.plan()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_every_source_reads_a_branch_as_its_files_are_read(
    hub: Hub, folder: Path, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.push(REPOSITORY, folder)
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    recipe = recipe_of(tmp_path / "a", chat_model, of_hub())
    by_branch = [step.fingerprint for step in recipe.plan()]
    assert not any("resolve" in line for line in hub.asked)  # a plan fetches no file
    assert json.loads((recipe.root / REVISIONS).read_text()) == {f"{REPOSITORY}@main": first}
    by_commit = recipe_of(tmp_path / "b", chat_model, of_hub(first), "chats", "pairs", "facts")
    assert [step.fingerprint for step in by_commit.plan()] == by_branch[1:]
    recipe.run()
    local = lambda config: {  # noqa: E731
        "kind": "parquet",
        "paths": [str(folder / file.replace("[", "[[]")) for file in FILES[config]],
    }
    from_files = recipe_of(tmp_path / "c", chat_model, local)
    from_files.run()
    assert shards_of(recipe) == shards_of(from_files)
    fetched = {
        line.rpartition(f"{first}/")[2] for line in hub.asked if line.startswith("GET /data")
    }
    assert fetched == {"README.md", *(file for files in FILES.values() for file in files)}
    # A branch that moves moves no recipe of this root; what is in the cache is asked for no more.
    (folder / "facts.parquet").write_bytes(b"of another day")
    assert hub.push(REPOSITORY, folder) != first
    hub.asked.clear()
    assert [step.fingerprint for step in recipe.plan()] == by_branch
    use_hub(monkeypatch, hub.url, tmp_path / "hub", offline=True)
    by_commit.run()
    assert shards_of(by_commit).items() <= shards_of(recipe).items() and not hub.asked
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    (recipe.root / REVISIONS).unlink()
    assert [step.fingerprint for step in recipe.plan()] != by_branch


def test_what_is_not_there_is_one_line(
    hub: Hub, folder: Path, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.push(REPOSITORY, folder)
    use_hub(monkeypatch, hub.url, tmp_path / "hub")

    def made(source_of: Any) -> TinyRecipe:
        return recipe_of(tmp_path / "recipe", chat_model, source_of, "facts")

    other = refusal(made(of_hub(name="someone/else")))
    assert other.startswith("steps.facts.sources[0].source: someone/else at revision main: the hub")
    assert "has no such data set, or it is private" in other
    assert "no such data set" in refusal(made(of_hub(commit, name="someone/else")), when_run=True)
    assert "no such revision of it" in refusal(made(of_hub("no-such-branch")))
    assert "no such revision of it" in refusal(made(of_hub("0" * 40)), when_run=True)
    assert "'a/b/c' is no hub name (owner/name): local files" in refusal(made(of_hub(name="a/b/c")))
    told = refusal(made(of_hub(split="dev")), when_run=True)
    assert told.endswith("it has no split 'dev'; there are: train")
    told = refusal(made(of_hub(config=None)), when_run=True)
    assert "source.config is None" in told and "'pairs', 'facts'" in told
    use_hub(monkeypatch, hub.url, tmp_path / "empty", offline=True)
    for revision in ("other", commit):
        told = refusal(made(of_hub(revision)), when_run=True)
        assert "is not whole in the cache of this machine, and the hub cannot be reached" in told
        assert "(HF_HUB_OFFLINE is set)" in told
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "empty")
    assert "the hub cannot be reached" in refusal(made(of_hub(commit)), when_run=True)
    # A commit that was written down for a branch, and that the hub has no more.
    use_hub(monkeypatch, hub.url, tmp_path / "empty")
    made(of_hub()).plan()
    del hub.commits[REPOSITORY][commit]
    told = refusal(made(of_hub()), when_run=True)
    assert "the hub has no such revision of it (any more)" in told and REVISIONS in told


def test_a_torn_download_is_never_read_and_gone_on_with(
    hub: Hub, folder: Path, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(REPOSITORY, folder)
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    recipe = recipe_of(tmp_path / "recipe", chat_model, of_hub(), "texts")
    hub.broken.add("texts/part-1.parquet")
    assert "hub data set 'someone/rows'" in refusal(recipe, when_run=True)
    use_hub(monkeypatch, hub.url, tmp_path / "hub", offline=True)
    assert "is not whole in the cache of this machine" in refusal(recipe, when_run=True)
    hub.broken.clear()
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    assert recipe.run().finished == ["texts"]


def test_a_private_data_set_takes_the_token_from_its_place_and_nobody_writes_it_down(
    hub: Hub, folder: Path, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(REPOSITORY, folder)
    hub.private.add(REPOSITORY)
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    recipe = recipe_of(tmp_path / "recipe", chat_model, of_hub(), "facts")
    assert "or it is private" in refusal(recipe)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert recipe.run().finished == ["facts"]
    files = [path for path in recipe.root.rglob("*") if path.is_file()]
    assert files and not any(TOKEN.encode() in path.read_bytes() for path in files)


def test_files_without_a_card_are_read_by_their_names(
    hub: Hub, folder: Path, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    facts = pq.read_table(folder / "facts.parquet").to_pylist()
    (plain / "train.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    (plain / "test.jsonl").write_text("not read")
    hub.push(REPOSITORY, plain)
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    recipe = recipe_of(tmp_path / "recipe", chat_model, of_hub(config=None), "facts")
    assert recipe.run().finished == ["facts"]
    assert not any("test.jsonl" in line for line in hub.asked)


def read_all(hub: Hub, folder: Path) -> list[str]:
    """The texts of the split ``train`` of what is pushed."""
    body = {"kind": "hub", "name": NAME, "revision": hub.push(REPOSITORY, folder), "split": "train"}
    return [record["text"] for _, record in read_records(HubData.model_validate(body), Rejects())]


def test_archives_are_read_by_what_is_in_them(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    archives = tmp_path / "archives"
    archives.mkdir()
    with zipfile.ZipFile(archives / "train.zip", "w") as archive:
        archive.writestr("rows.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    assert read_all(hub, archives) == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"weights.bin": "x"}, "No (supported) data files found in someone/rows"),
        ({"README.md": "# Rows"}, "someone/rows doesn't contain any data files"),
        ({"README.md": CARD}, "No (supported) data files found in someone/rows"),
    ],
)
def test_a_repository_without_rows_is_one_line(
    hub: Hub, files: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    (tmp_path / "pushed").mkdir()
    for name, text in files.items():
        (tmp_path / "pushed" / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_all(hub, tmp_path / "pushed")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_is_named(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*names: str, **what: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    use_hub(monkeypatch, hub.url, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(StoreError, match=r"no space left in .*: free some, or set HF_HOME"):
        read_all(hub, folder)
