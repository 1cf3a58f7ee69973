"""``teachercache ls``: what lies in a root, what is whole of it, and what is made of what."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.storage.manifest import read_manifest
from tests.fixtures.tiny_recipe import TinyRecipe, stamps, teachercache
from tests.servers.s3_server import Server, running_server, use_endpoint


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


def listed(place: str | Path) -> dict[str, dict[str, Any]]:
    """Return what ``ls --json`` says of each folder, by its name below the root."""
    said = teachercache("ls", place, "--json")
    assert said.code == 0 and not said.err, said.err
    entries = json.loads(said.out)
    return {"/".join(entry["folder"].split("/")[-2:]): entry for entry in entries}


def below(recipe: TinyRecipe, name: str) -> str:
    folder = recipe.step(name).folder
    return f"{folder.parent.name}/{folder.name}"


def test_each_table_and_checkpoint_with_what_it_is_made_of(copied: TinyRecipe) -> None:
    before = stamps(copied.root)
    found = listed(copied.root)
    assert stamps(copied.root) == before
    names = {step.name: below(copied, step.name) for step in copied.plan()}
    assert set(found) == set(names.values())
    made_of = {name: set(found[place]["made_of"]) for name, place in names.items()}
    documents, signals = names["documents"], names["signals"]
    assert made_of == {
        "documents": set(),
        "signals": {documents},
        "states": {documents},
        "student": set(),
        "distilled": {documents, signals, names["student"]},  # by what they hold
        "results": {documents, signals, names["distilled"]},
    }
    whats = {name: found[place]["what"] for name, place in names.items()}
    assert whats == {
        "documents": "",
        "signals": "threshold",
        "states": "exact",
        "student": "student_init",
        "distilled": "train",
        "results": "evaluate",
    }
    for name, place in names.items():
        entry, step = found[place], copied.step(name)
        assert (entry["state"], entry["why"]) == ("complete", "")
        assert entry["fingerprint"] == step.fingerprint
        files = [path for path in step.folder.rglob("*") if path.is_file()]
        assert entry["bytes"] == sum(path.stat().st_size for path in files)
        if step.writes_table:
            manifest = read_manifest(step.folder)
            counts = (manifest.num_rows, manifest.num_tokens, manifest.num_positions)
            assert (entry["rows"], entry["tokens"], entry["positions"]) == counts
            assert entry["made_by"] == f"tiny/{name}"  # the shards' records say it
        else:
            assert entry["made_by"] == ""


def test_a_recipe_names_its_own_steps_and_people_get_a_table(copied: TinyRecipe) -> None:
    found = listed(copied.path)
    assert found[below(copied, "distilled")]["made_by"] == "tiny/distilled"
    other = listed_after_a_change(copied)
    assert other[below(copied, "distilled")]["made_by"] == ""  # none of that recipe's steps
    said = teachercache("ls", copied.path)
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 120 and lines[-1].startswith(f"{copied.root}: 6 complete; ")
    row = next(line for line in lines if copied.step("signals").folder.name in line)
    rows = read_manifest(copied.step("signals").folder).num_rows
    assert row.split()[:5] == [
        *("teacher_logits", copied.step("signals").folder.name, "threshold", "complete"),
        str(rows),
    ]


def listed_after_a_change(recipe: TinyRecipe) -> dict[str, dict[str, Any]]:
    body = recipe.path.read_text().replace("max_steps: 2", "max_steps: 3")
    path = recipe.path.with_name("changed.yaml")
    path.write_text(body)
    return listed(path)


def test_what_is_not_whole_is_told(copied: TinyRecipe) -> None:
    documents, signals = copied.step("documents").folder, copied.step("signals").folder
    states, student = copied.step("states").folder, copied.step("student").folder
    shard = next(iter(sorted(signals.glob("shard-*.arrow"))))
    shard.write_bytes(shard.read_bytes()[:-1])
    (documents / "manifest.json").unlink()
    (states / "manifest.json").write_text('{"format": 2, "identity": ["..", 3]}')
    (student / "model.safetensors").unlink()
    (documents / "shard-00000-of-00009.arrow.tmp-0123456789ab").write_bytes(b"torn")
    found = listed(copied.root)
    entry = found[below(copied, "documents")]
    num_shards = len(list(documents.glob("*.arrow")))
    assert (entry["state"], entry["why"]) == ("unfinished", f"{num_shards} shards")
    assert entry["temporary"] == ["shard-00000-of-00009.arrow.tmp-0123456789ab"]
    assert entry["made_by"] == "tiny/documents"
    for step, why in (
        ("signals", "its manifest says"),
        ("states", "is damaged"),
        ("student", "1 of its files are missing (first: model.safetensors)"),
    ):
        entry = found[below(copied, step)]
        assert entry["state"] == "damaged" and why in entry["why"]
    out = teachercache("ls", copied.root).out
    assert "3 damaged, 1 unfinished" in out.replace("2 complete, ", "")
    assert f"{below(copied, 'documents')}: 1 temporary files, 4 bytes" in out


def test_names_that_the_data_hold_are_only_text(copied: TinyRecipe) -> None:
    signals = copied.step("signals").folder
    manifest = signals / "manifest.json"
    body = json.loads(manifest.read_text())
    body["identity"]["inputs"] = ["../../../etc", "/etc/passwd", {"step": 1}, 7]
    body["identity"]["models"] = "none"
    body["variant"] = "[red]threshold"
    manifest.write_text(json.dumps(body))
    record = min(signals.glob("shard-*.json"))
    notes = json.loads(record.read_text())
    notes["notes"]["recipe"] = "../[red]x"
    record.write_text(json.dumps(notes))
    entry = listed(copied.root)[below(copied, "signals")]
    assert (entry["made_of"], entry["made_by"]) == ([], "")
    assert "[red]" in teachercache("ls", copied.root).out


def test_links_and_folders_of_others_are_left_out(copied: TinyRecipe, tmp_path: Path) -> None:
    signals = copied.step("signals").folder
    moved = tmp_path / "elsewhere"
    shutil.move(signals, moved)
    signals.symlink_to(moved)
    (copied.root / "documents" / "mine").mkdir()
    (copied.root / "documents" / "mine" / "manifest.json").write_text("{}")
    assert below(copied, "signals") not in listed(copied.root)
    assert len(listed(copied.root)) == 5


def test_a_place_without_any_is_one_line(tmp_path: Path) -> None:
    said = teachercache("ls", tmp_path)
    assert said.code == 2 and "holds no table and no checkpoint" in said.error


@pytest.mark.slow
def test_a_root_in_a_store_is_listed_the_same(
    copied: TinyRecipe, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, server.url)
    root = server.new_root()
    files = (path for path in copied.root.rglob("*") if path.is_file())
    server.put_files(root, copied.root, files)
    bucket = root.split("/")[2]
    server.client.put_object(Bucket=bucket, Key="cached/documents/0123456789ab/x", Body=b"")
    here, there = listed(copied.root), listed(root)
    for entries in (here, there):
        for entry in entries.values():
            entry.pop("folder")
    assert there == here
