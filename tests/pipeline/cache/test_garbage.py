"""``teachercache gc``: what no recipe needs goes when asked to, and nothing else ever does."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.state.step_lock import shards_lock, step_lock
from schemas.errors import StoreError
from tests.fixtures.tiny_recipe import TinyRecipe, stamps, teachercache
from tests.servers.s3_server import Server, running_server, use_endpoint

TORN = "shard-00000-of-00009.arrow.tmp-0123456789ab"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


def changed(recipe: TinyRecipe, name: str, **settings: object) -> TinyRecipe:
    """Return the recipe with other settings of one step, in a file of its own."""
    body = yaml.safe_load(recipe.path.read_text())
    body["steps"][name] |= settings
    path = recipe.path.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return TinyRecipe(path, recipe.root)


def folders(root: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in root.glob("*/*") if path.is_dir()}


def places(recipe: TinyRecipe, *names: str) -> set[str]:
    return {f"{s.place.parent.name}/{s.place.name}" for s in recipe.plan() if s.name in names}


ALL = ("documents", "signals", "states", "student", "distilled", "results")


def test_nothing_goes_of_what_a_recipe_needs(copied: TinyRecipe) -> None:
    before = stamps(copied.root)
    said = teachercache("gc", copied.root, "--keep", copied.path, "--delete")
    assert said.code == 0 and "0 bytes freed; 6 folders kept" in said.out, said
    assert stamps(copied.root) == before


def test_it_is_shown_first_and_removed_when_asked_to(copied: TinyRecipe) -> None:
    kept = changed(copied, "distilled", max_steps=3)
    before, gone = stamps(copied.root), places(copied, "distilled", "results")
    said = teachercache("gc", copied.root, "--keep", kept.path)
    assert said.code == 0 and "would be freed, --delete does it; 4 folders kept" in said.out, said
    listed = {line.split()[0] for line in said.out.splitlines() if line.startswith("  ")}
    assert listed == gone
    assert stamps(copied.root) == before
    size = sum(
        path.stat().st_size
        for name in gone
        for path in (copied.root / name).rglob("*")
        if path.is_file()
    )
    assert f"{size / 1000:.1f} kB would be freed" in said.out
    assert teachercache("gc", copied.root, "--keep", kept.path, "--delete").code == 0
    assert folders(copied.root) == places(copied, *ALL) - gone
    left = {name: stamp for name, stamp in before.items() if name[: name.rindex("/")] not in gone}
    assert stamps(copied.root) == {n: s for n, s in left.items() if not n.startswith(tuple(gone))}
    assert copied.run().finished == ["distilled", "results"]  # and can be made again


def test_several_recipes_keep_what_any_of_them_needs(copied: TinyRecipe) -> None:
    one = copied.only("documents", "states")
    other = changed(copied, "signals", max_rejected_fraction=0.5)  # the same folders
    keep = ("--keep", one.path, "--keep", other.path)
    assert "6 folders kept" in teachercache("gc", copied.root, *keep).out
    assert teachercache("gc", copied.root, "--keep", one.path, "--delete").code == 0
    assert folders(copied.root) == places(copied, "documents", "states")


def test_what_a_kept_table_was_made_of_stays(copied: TinyRecipe) -> None:
    """A recipe that reads a finished table names neither its input nor that one's recipe."""
    body = yaml.safe_load(copied.path.read_text())
    folder = str(copied.step("signals").folder)
    body["steps"] = {"signals": {"stage": "finished_table", "folder": folder}}
    body["execution"]["root"] = str(copied.root.with_name("another"))
    path = copied.path.with_name("reads.yaml")
    path.write_text(yaml.safe_dump(body))
    assert teachercache("gc", copied.root, "--keep", path, "--delete").code == 0
    assert folders(copied.root) == places(copied, "documents", "signals")


def test_a_model_that_is_named_by_its_folder_stays(copied: TinyRecipe) -> None:
    body = yaml.safe_load(copied.path.read_text())
    student = str(copied.step("distilled").folder)
    body["models"]["teacher"] = {"path": student, "dtype": "float32", "engine": "transformers"}
    body["steps"] = {"documents": body["steps"]["documents"]}
    path = copied.path.with_name("named.yaml")
    path.write_text(yaml.safe_dump(body))
    assert teachercache("gc", copied.root, "--keep", path, "--delete").code == 0
    made_of = places(copied, "documents", "signals", "student")
    assert folders(copied.root) == places(copied, "distilled") | made_of


def test_unfinished_folders_and_torn_files_are_named_apart(copied: TinyRecipe) -> None:
    documents, states = copied.step("documents").folder, copied.step("states").folder
    (states / "manifest.json").unlink()
    (documents / TORN).write_bytes(b"torn")
    kept = copied.only("documents", "signals")
    out = teachercache("gc", copied.root, "--keep", kept.path).out
    parts = out.split("unfinished, not needed:\n")[1].split("temporary files of killed runs:\n")
    assert parts[0].split()[0] in places(copied, "states")
    assert parts[1].splitlines()[0].split() == [*places(copied, "documents"), "4", "bytes", TORN]
    assert teachercache("gc", copied.root, "--keep", kept.path, "--delete").code == 0
    assert not (documents / TORN).exists() and (documents / "manifest.json").exists()
    assert folders(copied.root) == places(copied, "documents", "signals")


def test_nothing_goes_while_a_run_of_no_given_recipe_is_at_work(copied: TinyRecipe) -> None:
    """What it reads is not known, so not even what it does not write may go."""
    kept = copied.only("documents")
    with step_lock(copied.step("states").folder):
        before = stamps(copied.root)
        shown = teachercache("gc", copied.root, "--keep", kept.path)
        assert shown.code == 0 and "being written by a run that is of no given recipe" in shown.out
        said = teachercache("gc", copied.root, "--keep", kept.path, "--delete")
        assert said.code == 1 and "is being written by a run" in said.error
        assert stamps(copied.root) == before
    with shards_lock(copied.step("states").folder, range(1)):
        said = teachercache("gc", copied.root, "--keep", kept.path, "--delete")
        assert said.code == 1 and "is being written by a run" in said.error
    with step_lock(copied.step("documents").folder):  # whose recipe is given: all is known
        (copied.step("documents").folder / TORN).write_bytes(b"in hand")
        assert teachercache("gc", copied.root, "--keep", kept.path, "--delete").code == 0
        assert (copied.step("documents").folder / TORN).exists()
    assert folders(copied.root) == places(copied, "documents")


def test_nothing_outside_the_root_is_ever_touched(copied: TinyRecipe, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "0123456789ab").mkdir(parents=True)
    for name in ("manifest.json", "0123456789ab/manifest.json", "head.safetensors", "lock"):
        (outside / name).write_text("mine")
    mine = copied.root / "documents" / "mine"  # no step's name
    mine.mkdir()
    (mine / "manifest.json").write_text("{}")
    (copied.root / "notes").mkdir()
    (copied.root / "notes" / "0123456789ab").mkdir()
    (copied.root / "notes" / "0123456789ab" / "manifest.json").write_text("{}")
    (copied.root / "responses").symlink_to(outside)  # a table's name
    (copied.root / "documents" / "0123456789ab").symlink_to(outside)
    states, signals = copied.step("states").folder, copied.step("signals").folder
    for folder, name in ((states, "../../../outside"), (signals, str(outside / "manifest.json"))):
        body = json.loads((folder / "manifest.json").read_text())
        body["files"] = {name: "0" * 64, "../../documents/mine/manifest.json": "0" * 64}
        body["identity"]["inputs"] = [name]
        body["fingerprint"] = name
        (folder / "manifest.json").write_text(json.dumps(body))
        (folder / "link").symlink_to(outside)
        (folder / "link.safetensors").symlink_to(outside / "head.safetensors")
    (signals / ".lock").unlink()
    (signals / ".lock").symlink_to(outside / "lock")
    before, names = stamps(outside), stamps(mine)
    kept = copied.only("documents")
    said = teachercache("gc", copied.root, "--keep", kept.path, "--delete")
    assert said.code == 0, said
    assert stamps(outside) == before and stamps(mine) == names
    assert all(path.read_text() == "mine" for path in outside.rglob("*") if path.is_file())
    assert not states.exists() and not signals.exists()
    assert os.path.islink(copied.root / "responses")
    assert (copied.root / "notes" / "0123456789ab" / "manifest.json").exists()
    assert (copied.step("documents").folder / "manifest.json").exists()


def test_a_recipe_of_another_root_is_refused(copied: TinyRecipe, tmp_path: Path) -> None:
    text = copied.path.read_text().replace(f"root: {copied.root}", f"root: {tmp_path / 'other'}")
    path = tmp_path / "other.yaml"
    path.write_text(text)
    before = stamps(copied.root)
    said = teachercache("gc", copied.root, "--keep", path, "--delete")
    assert said.code == 2 and "reads nothing of" in said.error
    assert stamps(copied.root) == before


@pytest.mark.slow
def test_a_root_in_a_store_is_cleaned_the_same(
    copied: TinyRecipe, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, server.url)
    root, client = server.new_root(), server.client
    bucket, prefix = root.removeprefix("s3://").split("/")
    files = (path for path in copied.root.rglob("*") if path.is_file() and path.name != ".lock")
    server.put_files(root, copied.root, files)
    client.put_object(Bucket=bucket, Key="cached/documents/0123456789ab/x", Body=b"")
    kept = copied.only("documents", "signals")
    body = yaml.safe_load(kept.path.read_text())
    body["execution"]["root"] = root
    kept.path.write_text(yaml.safe_dump(body))
    before = server.objects(root)
    assert teachercache("gc", root, "--keep", kept.path).code == 0
    assert server.objects(root) == before
    assert teachercache("gc", root, "--keep", kept.path, "--delete").code == 0
    stays = ("cached/", *(f"{prefix}/{p}/" for p in places(copied, "documents", "signals")))
    assert server.objects(root) == {k: v for k, v in before.items() if k.startswith(stays)}


@pytest.mark.parametrize("name", ["../../../outside/weights", "/etc/hostname", "a/../../b", "."])
def test_names_that_lead_out_of_a_folder_are_taken_for_damage(
    copied: TinyRecipe, name: str
) -> None:
    """By whatever reads a manifest or a checkpoint's record, before it looks at any file."""
    student, states = copied.step("student").folder, copied.step("states").folder
    for record in (student / "checkpoint.json", states / "manifest.json"):
        body = json.loads(record.read_text())
        body["files"] = {name: "0" * 64}
        record.write_text(json.dumps(body))
    problem = f"it names '{name}', which is no file below its folder"
    for command in (("verify", student), ("verify", states)):
        said = teachercache(*command)
        assert said.code == 1 and problem in said.out
    said = teachercache("repair", copied.path)
    assert said.code == 1 and problem in said.error
    assert teachercache("ls", copied.root).out.count(problem) == 2


def test_a_lock_that_is_a_link_is_not_followed(copied: TinyRecipe, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    lock = copied.step("signals").folder / ".lock"
    lock.unlink()
    lock.symlink_to(mine)
    with pytest.raises(StoreError, match="cannot write in"), step_lock(lock.parent):
        pass
    assert mine.read_text() == "mine"
