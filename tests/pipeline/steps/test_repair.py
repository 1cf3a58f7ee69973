"""``teachercache repair``: what is damaged of a finished table is made again, and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.state.step_lock import step_lock
from schemas.storage.manifest import read_manifest, write_manifest
from tests.fixtures.tiny_recipe import (
    TinyRecipe,
    make_recipe,
    stamps,
    table_bytes,
    teachercache,
)
from tests.fixtures.token_file_kinds import some_ids, token_recipe, write_tokens
from tests.servers.s3_server import running_server, use_endpoint

pytestmark = pytest.mark.usefixtures("own_cache")

MORE_STEPS = {
    "states": {
        "stage": "teacher_logits",
        "input": "documents",
        "model": "teacher",
        "encoding": {"kind": "exact"},
    },
    "student": {"stage": "student_init", "model": "teacher", "layers": [0]},
    "results": {
        "stage": "evaluate",
        "students": ["student"],
        "data": ["documents", "signals"],
    },
}


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder, tiny_model, paragraphs[:30], more_steps=MORE_STEPS)
    recipe.run()
    return recipe


@pytest.fixture
def copied(finished: TinyRecipe, tmp_path: Path) -> TinyRecipe:
    return finished.copy(tmp_path / "copied")


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def shard(recipe: TinyRecipe, step: str, index: int) -> Path:
    return sorted(recipe.step(step).folder.glob("shard-*.arrow"))[index]


def changed_files(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Names of files that are new or were written again; none may be gone."""
    assert before.keys() <= after.keys()
    return {Path(name).name for name, stamp in after.items() if before.get(name) != stamp}


@pytest.mark.parametrize("harm", [flip_a_byte, cut, Path.unlink])
@pytest.mark.parametrize("step", ["documents", "signals"])
def test_one_damaged_shard_is_made_again_alone(
    copied: TinyRecipe, step: str, harm: Callable[[Path], None]
) -> None:
    before, content = stamps(copied.root), table_bytes(copied.step(step).folder)
    damaged = shard(copied, step, 1)
    harm(damaged)
    assert teachercache("verify", copied.root).code == 1
    said = teachercache("repair", copied.path)
    assert said.code == 0, said
    assert f"{step}: made again: {damaged.name}; the rest is whole\n" in said.out
    assert f"{step}: with the bytes they had\n" in said.out
    assert said.out.count("are whole\n") == 2
    assert table_bytes(copied.step(step).folder) == content
    assert changed_files(before, stamps(copied.root)) == {damaged.name, f"{damaged.stem}.json"}
    assert teachercache("verify", copied.root).code == 0


def test_two_damaged_shards_and_the_head_beside_them(copied: TinyRecipe) -> None:
    folder = copied.step("states").folder
    before, content = stamps(copied.root), table_bytes(folder)
    head = next(folder / name for name in read_manifest(folder).files)
    first, last = shard(copied, "states", 0), shard(copied, "states", -1)
    flip_a_byte(first)
    last.unlink()
    cut(head)
    said = teachercache("repair", copied.path, "--step", "states")
    assert said.code == 0 and f"made again: {first.name}, {last.name}, {head.name};" in said.out
    assert table_bytes(folder) == content
    written = changed_files(before, stamps(copied.root))
    records = {f"{path.stem}.json" for path in (first, last)}
    assert written == {first.name, last.name, *records, *read_manifest(folder).files}
    flip_a_byte(head)  # alone: no shard is made for it
    before = stamps(copied.root)
    assert teachercache("repair", copied.path, "--step", "states").code == 0
    assert table_bytes(folder) == content
    assert changed_files(before, stamps(copied.root)) == set(read_manifest(folder).files)


def test_whole_tables_are_left_as_they_are(copied: TinyRecipe) -> None:
    before = stamps(copied.root)
    said = teachercache("repair", copied.path)
    assert said.code == 0 and said.out.count("shards are whole\n") == 3
    assert stamps(copied.root) == before


def test_another_step_is_not_touched(copied: TinyRecipe) -> None:
    flip_a_byte(shard(copied, "signals", 2))
    before = stamps(copied.root)
    said = teachercache("repair", copied.path, "--step", "states")
    assert said.code == 0 and "signals" not in said.out
    assert stamps(copied.root) == before
    assert teachercache("verify", copied.step("signals").folder).code == 1


def test_a_damaged_input_comes_first(copied: TinyRecipe) -> None:
    """Alone, a step is refused what it would read; of a whole recipe both are made again."""
    content = {step.name: table_bytes(step.folder) for step in copied.plan() if step.writes_table}
    flip_a_byte(shard(copied, "documents", 1))
    flip_a_byte(shard(copied, "signals", 1))
    before = stamps(copied.root)
    said = teachercache("repair", copied.path, "--step", "signals")
    assert said.code == 1 and "input shard" in said.error and "has sha256" in said.error
    assert stamps(copied.root) == before
    assert teachercache("repair", copied.path).code == 0
    for name, files in content.items():
        assert table_bytes(copied.step(name).folder) == files


def test_an_input_that_has_gone_is_one_line(copied: TinyRecipe) -> None:
    flip_a_byte(shard(copied, "signals", 1))
    (copied.step("documents").folder / "manifest.json").unlink()
    for step in ((), ("--step", "signals")):
        said = teachercache("repair", copied.path, *step)
        assert said.code == 1 and "'documents', which 'signals' reads, is not fini" in said.error


def test_other_bytes_of_the_same_rows_make_a_new_manifest_and_name_what_is_stale(
    copied: TinyRecipe,
) -> None:
    """As where an engine rounds otherwise now: what the manifest was written with is gone."""
    folder = copied.step("signals").folder
    manifest = read_manifest(folder)
    others = [replace(manifest.shards[0], sha256="0" * 64), *manifest.shards[1:]]
    write_manifest(folder, replace(manifest, shards=others))
    said = teachercache("repair", copied.path)
    assert said.code == 0 and "signals: other bytes than before, with as many rows" in said.out
    assert "signals: made of the old bytes: results; to have them" in said.out
    now = read_manifest(folder)
    assert list(now.shards) == list(manifest.shards) and now.dataset_id == manifest.dataset_id
    assert teachercache("verify", copied.root).code == 0


def test_other_rows_than_before_are_refused(copied: TinyRecipe) -> None:
    folder = copied.step("signals").folder
    manifest = read_manifest(folder)
    first = manifest.shards[0]
    others = [replace(first, num_rows=first.num_rows + 1, sha256="0" * 64), *manifest.shards[1:]]
    write_manifest(folder, replace(manifest, shards=others))
    before = (folder / "manifest.json").read_bytes()
    said = teachercache("repair", copied.path)
    assert said.code == 1
    assert f"{first.num_rows} rows" in said.error and f"{first.num_rows + 1} rows" in said.error
    assert (folder / "manifest.json").read_bytes() == before


def test_a_table_that_a_run_is_writing_is_refused(copied: TinyRecipe) -> None:
    flip_a_byte(shard(copied, "signals", 0))
    before = stamps(copied.root)
    with step_lock(copied.step("signals").folder):
        said = teachercache("repair", copied.path, "--step", "signals")
    assert said.code == 1 and "is being written by" in said.error
    assert stamps(copied.root) == before


def test_a_finished_table_of_another_recipe_is_repaired_there(copied: TinyRecipe) -> None:
    folder = copied.step("documents").folder
    given = {"stage": "finished_table", "folder": str(folder)}
    body = copied.only("documents")
    text = body.path.read_text()
    start = text.index("  documents:")
    stop = text.index("execution:")
    body.path.write_text(f"{text[:start]}  documents: {given}\n{text[stop:]}")
    flip_a_byte(shard(copied, "documents", 0))
    said = teachercache("repair", body.path)
    assert said.code == 1 and "repair it by the recipe that makes it" in said.error


def test_rows_that_an_earlier_shard_has_stay_left_out(tiny_model: Path, tmp_path: Path) -> None:
    rows = some_ids(40)
    for name, part in (("a", rows[:20]), ("b", rows[10:])):
        write_tokens(tmp_path / "files", "megatron", part, name)
    source = {"kind": "megatron", "paths": [str(tmp_path / "files" / "*.idx")]}
    recipe = token_recipe(tmp_path / "recipe", tiny_model, source, rows_per_shard=4)
    recipe.run()
    folder = recipe.step("ids").folder
    content, before = table_bytes(folder), stamps(recipe.root)
    shards = read_manifest(folder).shards
    thinned = next(s for s in shards if s.rejects.get("duplicate_of_earlier_shard"))
    flip_a_byte(folder / thinned.file)
    (folder / shards[0].file).unlink()  # whose rows the other one repeats
    said = teachercache("repair", recipe.path)
    assert said.code == 0 and "with the bytes they had" in said.out, said
    assert table_bytes(folder) == content
    written = changed_files(before, stamps(recipe.root))
    rejects = f"{thinned.name}.rejects.jsonl"
    made = {f"{s.name}.{end}" for s in (shards[0], thinned) for end in ("arrow", "json")}
    assert made <= written <= made | {rejects}


def test_a_table_that_is_not_finished_is_left_to_run(copied: TinyRecipe) -> None:
    folder = copied.step("signals").folder
    (folder / "manifest.json").unlink()
    shard(copied, "signals", 0).unlink()
    before = stamps(copied.root)
    said = teachercache("repair", copied.path)
    assert said.code == 0 and "signals" not in said.out
    assert stamps(copied.root) == before


@pytest.mark.slow
def test_a_root_in_a_store_is_repaired_the_same(
    copied: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object that is gone, and one that another tool wrote over."""
    with running_server() as server:
        use_endpoint(monkeypatch, server.url)
        root, client = server.new_root(), server.client
        bucket, prefix = root.removeprefix("s3://").split("/")
        kept = copied.only("documents", "signals")
        for step in kept.plan():
            server.put_files(root, copied.root, step.folder.glob("[!.]*"))
        kept.path.write_text(kept.path.read_text().replace(f"root: {copied.root}", f"root: {root}"))
        before = tables_in(server.objects(root))
        gone, other = (
            f"{prefix}/{shard(copied, 'signals', index).relative_to(copied.root)}"
            for index in (0, 2)
        )
        client.delete_object(Bucket=bucket, Key=gone)
        client.put_object(Bucket=bucket, Key=other, Body=b"other")
        said = teachercache("repair", kept.path)
        assert said.code == 0 and "signals: with the bytes they had" in said.out, said
        names = ", ".join(name.rsplit("/", 1)[1] for name in (gone, other))
        assert f"made again: {names};" in said.out
        assert tables_in(server.objects(root)) == before


def tables_in(objects: dict[str, bytes]) -> dict[str, bytes]:
    """All but the shards' records, which tell when each was made."""
    return {key: body for key, body in objects.items() if "/shard-" not in key or ".arrow" in key}
