"""Stage ``token_files``: ids come out of every format as they went in, and nothing else does."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import stages.sources.token_files.layout
from pipeline.cache.verify import verify_folder
from schemas import open_dataset
from schemas.errors import ConfigError, RejectLimitError
from schemas.sample_id import sample_id_of
from schemas.storage.manifest import read_manifest
from tests.fixtures.tiny_recipe import TinyRecipe, table_bytes
from tests.fixtures.token_file_kinds import (
    BY_DATATROVE,
    FORMATS,
    WRITTEN,
    WRITTEN_MASKS,
    kind_of,
    some_ids,
    token_recipe,
    write_tokens,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]


def rows_of(recipe: TinyRecipe, split: str | None = None) -> list[dict[str, Any]]:
    dataset = open_dataset([recipe.step("ids").folder], split=split)
    return [dataset[index] for index in range(len(dataset))]


def ids_of(recipe: TinyRecipe, split: str | None = None) -> list[list[int]]:
    return [row["input_ids_T"].tolist() for row in rows_of(recipe, split)]


def rejects_of(recipe: TinyRecipe) -> dict[str, int]:
    return dict(read_manifest(recipe.step("ids").folder).rejects)


def source_of(form: str, path: Path, **settings: Any) -> dict[str, Any]:
    return {"kind": kind_of(form), "paths": [str(path)], **settings}


@pytest.mark.parametrize("form", FORMATS)
def test_ids_come_out_as_they_went_in_and_in_order(
    form: str, tiny_model: Path, tmp_path: Path
) -> None:
    rows = some_ids(50)
    recipe = token_recipe(tmp_path, tiny_model, source_of(form, write_tokens(tmp_path, form, rows)))
    recipe.run()
    held_out = [int(sample_id_of(np.array(r))[:16], 16) < 2**62 for r in rows]  # a quarter of 2^64
    sides = list(zip(rows, held_out, strict=True))
    assert ids_of(recipe, "train") == [row for row, held in sides if not held]
    assert ids_of(recipe, "heldout") == [row for row, held in sides if held]
    assert 0 < sum(held_out) < len(rows) and rejects_of(recipe) == {}
    assert not verify_folder(recipe.step("ids").folder)


def test_equal_ids_make_equal_tables_whatever_they_lie_in(tiny_model: Path, tmp_path: Path) -> None:
    rows, made = some_ids(40), []
    for form in FORMATS:
        folder = tmp_path / form
        path = write_tokens(folder, form, rows)
        recipe = token_recipe(folder, tiny_model, source_of(form, path))
        recipe.run()
        made.append(
            {n: b for n, b in table_bytes(recipe.step("ids").folder).items() if "arrow" in n}
        )
    assert all(shards == made[0] for shards in made) and made[0]


@pytest.mark.parametrize("name", ["ids2.ds", "ids4.ds", "ids2.bin", "ids4.idx"])
def test_files_of_datatroves_own_writers(name: str, tiny_model: Path, tmp_path: Path) -> None:
    kind = "datatrove" if name.endswith(".ds") else "megatron"
    source = source_of(kind, BY_DATATROVE / name, **({"mask": False} if name == "ids4.ds" else {}))
    recipe = token_recipe(tmp_path, tiny_model, source, heldout_fraction=0.0)
    recipe.run()
    assert ids_of(recipe) == WRITTEN


def test_a_loss_file_says_what_is_scored(tiny_model: Path, tmp_path: Path) -> None:
    source = source_of("datatrove", BY_DATATROVE / "ids4.ds", mask=True)
    recipe = token_recipe(tmp_path, tiny_model, source, heldout_fraction=0.0)
    recipe.run()
    found = {tuple(row["input_ids_T"].tolist()): row["scored_S2"] for row in rows_of(recipe)}
    for ids, mask in zip(WRITTEN, WRITTEN_MASKS, strict=True):
        scored = [at for a, b in found[tuple(ids)] for at in range(a, b)]
        assert scored == [at for at, is_scored in enumerate(mask) if is_scored and at > 0]


MASKS: list[list[int]] = [[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0]]
ROWS = [[5, 6, 7, 8], [9, 8, 7, 6], [1, 2, 3, 4], [4, 3, 2, 1]]


@pytest.mark.parametrize("what", ["mask", "booleans", "labels"])
def test_masks_and_labels_become_spans(what: str, tiny_model: Path, tmp_path: Path) -> None:
    column: Any = [[bool(m) for m in mask] for mask in MASKS]
    if what == "mask":
        column = pa.array([[int(m) for m in mask] for mask in MASKS], pa.list_(pa.int8()))
    elif what == "labels":
        pairs = [zip(r, m, strict=True) for r, m in zip(ROWS, MASKS, strict=True)]
        column = [[token if is_scored else -100 for token, is_scored in pair] for pair in pairs]
    path = write_tokens(tmp_path, "parquet", ROWS, scored=column)
    setting = {"labels" if what == "labels" else "mask": "scored"}
    source = source_of("parquet", path, **setting)
    recipe = token_recipe(tmp_path, tiny_model, source, heldout_fraction=0.0)
    recipe.run()
    rows = rows_of(recipe)
    assert [row["scored_S2"].tolist() for row in rows] == [[[1, 3]], [[2, 4]], [[3, 4]]]
    assert rejects_of(recipe) == {"nothing_scored": 1}  # nothing stands before a first token
    assert not verify_folder(recipe.step("ids").folder)


def test_rows_too_long_are_rejected_cut_or_packed(tiny_model: Path, tmp_path: Path) -> None:
    rows = [list(range(1, 11)), list(range(20, 24)), [7, 8, 0], list(range(30, 39))]
    source = source_of("megatron", write_tokens(tmp_path, "megatron", rows))
    of: dict[str, TinyRecipe] = {}
    for mode in ("as_given", "truncate", "pack"):
        of[mode] = token_recipe(
            tmp_path / mode, tiny_model, source, mode=mode, length=6, heldout_fraction=0.0
        )
        of[mode].run()
    assert ids_of(of["as_given"]) == rows[1:3]
    assert rejects_of(of["as_given"]) == {"too_long": 2}
    assert ids_of(of["truncate"]) == [row[:6] for row in rows]
    end = [0]  # what the tiny tokenizer ends a text with; row 2 ends with it already
    stream = [*rows[0], *end, *rows[1], *end, *rows[2], *rows[3], *end]
    assert ids_of(of["pack"]) == [stream[at : at + 6] for at in range(0, len(stream) - 5, 6)]
    assert rejects_of(of["pack"]) == {"packing_remainder": 1}


def test_equal_rows_are_one_wherever_they_lie(tiny_model: Path, tmp_path: Path) -> None:
    rows = some_ids(30)
    again = [*rows[:20], rows[3], *rows[20:], *rows[:8]]  # in its own shard, and in later ones
    once = write_tokens(tmp_path / "once", "datatrove", rows)
    twice = write_tokens(tmp_path / "twice", "datatrove", again)
    made = []
    for path in (once, twice):
        recipe = token_recipe(path.parent, tiny_model, source_of("datatrove", path))
        events = recipe.run()
        made.append(recipe)
    assert ids_of(made[1], "train") == ids_of(made[0], "train")
    assert ids_of(made[1], "heldout") == ids_of(made[0], "heldout")
    rejects = rejects_of(made[1])
    assert sum(rejects.values()) == 9 and set(rejects) <= {
        "duplicate_sequence",
        "duplicate_of_earlier_shard",
    }
    assert any("rows of earlier shards left out" in line for line in events.lines)
    lines = [
        json.loads(line)
        for path in made[1].step("ids").folder.glob("*.rejects.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == 9 and {len(line["sample_id"]) for line in lines} == {24}
    assert not verify_folder(made[1].step("ids").folder)


# Headers alone.


@pytest.mark.parametrize("form", FORMATS)
def test_a_plan_reads_headers_alone(
    form: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, count = 4096, 4096  # 64 MiB of 32-bit ids, 32 MiB of 16-bit ones
    rows = np.random.default_rng(0).integers(0, 512, (count, width))
    path = write_tokens(tmp_path, form, rows.tolist())
    recipe = token_recipe(tmp_path, tiny_model, source_of(form, path), length=256, mode="truncate")
    recipe.plan()  # hashes the files, once
    monkeypatch.setattr("schemas.storage.checksums.sha256_of", _never)
    stages.sources.token_files.layout._opened.cache_clear()
    before = _bytes_read()
    pieces = recipe.step("ids").stage.pieces()  # type: ignore[union-attr]
    assert sum(piece.num_rows for piece in pieces if piece.split == "train") == count
    assert _bytes_read() - before < path.stat().st_size / 50


def _never(path: Path) -> str:
    raise AssertionError(f"{path} is read whole")


def _bytes_read() -> int:
    """Bytes that this process has asked for, and pages of mapped files that it has touched."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    faults = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields["rchar"]) + int(faults[9]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_read_is_hashed_and_where_it_lies_is_not(tiny_model: Path, tmp_path: Path) -> None:
    prints = []
    for name, ids in (("a", some_ids(9)), ("b", some_ids(9)), ("c", some_ids(9, seed=1))):
        path = write_tokens(tmp_path / name, "megatron", ids)
        recipe = token_recipe(tmp_path / name, tiny_model, source_of("megatron", path))
        prints.append(recipe.step("ids").fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_file_that_changes_under_a_run_ends_it(tiny_model: Path, tmp_path: Path) -> None:
    path = write_tokens(tmp_path, "parquet", some_ids(9))
    recipe = token_recipe(tmp_path, tiny_model, source_of("parquet", path))
    stage = recipe.step("ids").stage
    pieces = stage.pieces()  # type: ignore[union-attr]
    write_tokens(tmp_path, "parquet", some_ids(10))
    work = stage.work
    with pytest.raises(ConfigError, match="has changed since this run was planned"):
        list(work.make_rows(stage, 512, None, pieces[0]))


# Bad rows, counted.

GOOD = some_ids(20, seed=2)


@pytest.mark.parametrize(
    ("rows", "more", "reason"),
    [
        ([None], {}, "missing_ids"),
        ([[3, None, 4]], {}, "null_in_ids"),
        ([[3, 512]], {}, "token_outside_vocabulary"),
        ([[3, -1]], {}, "token_outside_vocabulary"),
        ([[]], {}, "too_few_tokens"),
        ([[3]], {}, "too_few_tokens"),
        ([[3, 4, 5]], {"mask": [[1, 1]]}, "mask_of_other_length"),
        ([[3, 4, 5]], {"mask": [None]}, "missing_mask"),
        ([[3, 4, 5]], {"mask": [[1, None, 1]]}, "null_in_mask"),
        ([[3, 4, 5]], {"mask": [[0, 1, 2]]}, "mask_not_0_or_1"),
        ([[3, 4, 5]], {"labels": [[4, 5, -100]]}, "labels_contradict_ids"),
        ([[3, 4, 5]], {"labels": [[-100, 4]]}, "labels_of_other_length"),
        ([[3, 4, 5]], {"labels": [None]}, "missing_labels"),
        ([[3, 4, 5]], {"labels": [[-100, -100, None]]}, "null_in_labels"),
        ([[3, 4, 5]], {"labels": [[-100, -100, -100]]}, "nothing_scored"),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "arrow stream"])
def test_a_bad_row_costs_itself_alone(
    form: str,
    rows: list[Any],
    more: dict[str, Any],
    reason: str,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    kinds = {"mask": pa.list_(pa.int8()), "labels": pa.list_(pa.int64())}
    good = {"mask": [[1] * len(r) for r in GOOD], "labels": [list(r) for r in GOOD]}
    columns = {
        name: pa.array([*good[name][:5], *bad, *good[name][5:]], kinds[name])
        for name, bad in more.items()
    }
    path = write_tokens(tmp_path, form, [*GOOD[:5], *rows, *GOOD[5:]], **columns)
    source = source_of(form, path, **dict.fromkeys(more, "")) | {name: name for name in more}
    recipe = token_recipe(
        tmp_path, tiny_model, source, heldout_fraction=0.3, max_rejected_fraction=0.1
    )
    recipe.run()
    assert rejects_of(recipe) == {reason: 1}
    assert sorted(ids_of(recipe)) == sorted(GOOD)
    listed = next(recipe.step("ids").folder.glob("*.rejects.jsonl")).read_text()
    assert json.loads(listed) == {"reason": reason, "sample_id": f"{path.name} row 5"}


def test_too_many_malformed_rows_end_the_step(tiny_model: Path, tmp_path: Path) -> None:
    path = write_tokens(tmp_path, "parquet", [*GOOD, [3, 600], [4, 700]])
    recipe = token_recipe(tmp_path, tiny_model, source_of("parquet", path), rows_per_shard=64)
    with pytest.raises(RejectLimitError) as caught:
        recipe.run()
    assert str(caught.value).endswith(
        f"2 of 22 rows are malformed, more than max_rejected_fraction 0.01: 2 x "
        f"'token_outside_vocabulary', first {path} row 20: token 600, the model has 512; repair "
        f"them, or raise max_rejected_fraction"
    )


# Bad files, one line before anything is made.


def _cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def _put(path: Path, at: int, data: bytes) -> None:
    body = bytearray(path.read_bytes())
    body[at : at + len(data)] = data
    path.write_bytes(bytes(body))


@pytest.mark.parametrize(
    ("form", "harm", "line"),
    [
        ("megatron", lambda p: _cut(p, 1), "no multiple of 2"),
        ("megatron", lambda p: _cut(p, 2), "its sequences end at byte"),
        ("megatron", lambda p: _cut(p.with_suffix(".idx"), 8), "it has 4"),
        ("megatron", lambda p: _put(p.with_suffix(".idx"), 0, b"TNTIDX"), "it begins with b'TNTI"),
        ("megatron", lambda p: _put(p.with_suffix(".idx"), 9, b"\x02"), "its version is 2"),
        ("megatron", lambda p: _put(p.with_suffix(".idx"), 17, b"\x07"), "its ids are float32"),
        ("megatron", lambda p: _put(p.with_suffix(".idx"), 17, b"\x63"), "its ids are code 99"),
        ("megatron", lambda p: _put(p.with_suffix(".idx"), 17, b"\x04"), "its ids are int32, and"),
        ("megatron", lambda p: _put(p.with_suffix(".idx"), 34 + 240, b"\x01"), "begins with seq"),
        ("arrow", lambda p: p.write_bytes(b""), "it is empty or cut"),
        ("megatron", lambda p: p.with_suffix(".idx").unlink(), "ids.idx is not beside it"),
        ("megatron", lambda p: p.with_suffix(".idx").write_bytes(b""), "it begins with b''"),
        ("datatrove", lambda p: _cut(p, 1), "no multiple of the 2 of an id"),
        ("datatrove", lambda p: _cut(p, 2), "its last document ends at token"),
        ("datatrove", lambda p: _cut(p.with_name("ids.ds.index"), 3), "no multiple of 8"),
        ("datatrove", lambda p: p.with_name("ids.ds.index").unlink(), "is not beside it"),
        ("datatrove", lambda p: p.with_name("ids.ds.loss").write_bytes(b"1"), "say `mask: true`"),
        (
            "datatrove",
            lambda p: p.with_name("ids.ds.metadata").write_text("gpt2|3\n9\n"),
            "an id has '3' bytes, expected 2 or 4",
        ),
        ("parquet", lambda p: _cut(p, 9), "cannot be read as parquet"),
        ("arrow stream", lambda p: p.write_bytes(b"none of ours"), "cannot be read as arrow"),
        ("arrow stream", lambda p: _cut(p, 200), "cannot be read as arrow"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_one_line(
    form: str, harm: Any, line: str, tiny_model: Path, tmp_path: Path
) -> None:
    path = write_tokens(tmp_path, form, GOOD)
    harm(path)
    recipe = token_recipe(tmp_path, tiny_model, source_of(form, path))
    with pytest.raises(ConfigError) as caught:
        recipe.run()
    assert line in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert str(tmp_path / "ids") in str(caught.value)


@pytest.mark.parametrize(
    ("form", "harm", "line"),
    [
        (
            "megatron",
            lambda p: _put(p.with_suffix(".idx"), 34, b"\xff\xff\xff\x7f"),
            "lies outside",
        ),
        (
            "megatron",
            lambda p: _put(p.with_suffix(".idx"), 34 + 80, b"\x01"),
            "begins inside an id",
        ),
        ("megatron", lambda p: _put(p.with_suffix(".idx"), 34 + 248, b"\x09"), "marked in order"),
        (
            "datatrove",
            lambda p: _put(p.with_name("ids.ds.index"), 8, b"\xff" * 4),
            "goes from token",
        ),
    ],
)
def test_an_index_that_points_elsewhere_ends_the_run(
    form: str, harm: Any, line: str, tiny_model: Path, tmp_path: Path
) -> None:
    path = write_tokens(tmp_path, form, GOOD)
    harm(path)
    recipe = token_recipe(tmp_path, tiny_model, source_of(form, path))
    with pytest.raises(ConfigError, match=line):
        recipe.run()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"column": "tokens"}, "no column 'tokens'; it has 'input_ids', 'x', 'm'"),
        ({"column": "x"}, "column 'x' holds list<item: double>, expected lists of integers"),
        ({"mask": "x"}, "expected lists of integers or booleans"),
        ({"labels": "m"}, "column 'm' holds bool, expected lists of integers"),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "arrow file", "arrow stream"])
def test_columns_that_are_not_what_they_should_be(
    form: str, settings: dict[str, str], line: str, tiny_model: Path, tmp_path: Path
) -> None:
    floats = pa.array([[float(i) for i in row] for row in GOOD])
    path = write_tokens(tmp_path, form, GOOD, x=floats, m=pa.array([True] * len(GOOD)))
    recipe = token_recipe(tmp_path, tiny_model, source_of(form, path, **settings))
    with pytest.raises(ConfigError) as caught:
        recipe.run()
    found = str(caught.value).replace("element:", "item:")
    assert line in found and str(path) in found


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"length": 300}, "steps.ids.length: got 300, but the model in"),
        ({"rows": []}, "hold no row: nothing can be made"),
    ],
)
def test_settings_that_no_row_can_meet(
    settings: dict[str, Any], line: str, tiny_model: Path, tmp_path: Path
) -> None:
    path = write_tokens(tmp_path, "parquet", settings.pop("rows", GOOD))
    recipe = token_recipe(tmp_path, tiny_model, source_of("parquet", path), **settings)
    with pytest.raises(ConfigError, match=line):
        recipe.run()
