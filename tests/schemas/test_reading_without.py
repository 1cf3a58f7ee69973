"""The lines of docs/guides/reading_without.md, run on a table, against what the package reads."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from schemas.dataset import open_dataset
from schemas.distribution import unpack_threshold, weighted_tokens
from schemas.tables import TABLES
from tests.fixtures.tiny_recipe import TinyRecipe, make_recipe, stamps, teachercache
from tests.house.tree import REPOSITORY

PAGE = REPOSITORY / "docs/guides/reading_without.md"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]


@pytest.fixture(scope="module")
def recipe(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    recipe = make_recipe(tmp_path_factory.mktemp("bare"), tiny_model, paragraphs[:40])
    recipe.run()
    return recipe


@pytest.fixture
def said(recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's lines leave, run one block after another in the recipe's place."""
    (tmp_path / "cache").symlink_to(recipe.root)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_every_line_of_the_page_reads_what_the_package_reads(
    recipe: TinyRecipe, said: dict[str, Any]
) -> None:
    documents, signals = (recipe.step(name).folder for name in ("documents", "signals"))
    dataset = open_dataset([documents, signals])
    rows = {row["sample_id"]: row for row in (dataset[index] for index in range(len(dataset)))}
    sums = {key: row["next_token_logprobs_P"].astype(np.float64).sum() for key, row in rows.items()}
    keys = said["scores"]["sample_id"].to_pylist()
    assert sorted(keys) == sorted(rows) and len(keys) > 30
    expected = np.array([sums[key] for key in keys])
    for name in ("pyarrow_sums", "pandas_sums"):
        np.testing.assert_array_equal(np.asarray(said[name]), expected, err_msg=name)
    np.testing.assert_allclose(said["polars_sums"].to_numpy(), expected, rtol=1e-5)
    assert said["row"]["sample_id"] == keys[0] and said["datasets_sum"] == expected[0]

    first = rows[keys[0]]
    packed = first["token_ids_PK"], first["num_head_P"], first["head_codes_E"]
    np.testing.assert_array_equal(said["ids_PK"], packed[0])
    np.testing.assert_allclose(said["weights_PK"], unpack_threshold(*packed), rtol=1e-6, atol=1e-7)
    targets = first["input_ids_T"][first["first_target"] :][: len(packed[0])]
    np.testing.assert_array_equal(said["targets_P"], targets)

    in_order = said["texts_pl"]["sample_id"].to_list()
    for name in ("joined", "lazy"):
        found = said[name]
        assert found["sample_id"].to_list() == [key for key in in_order if key in rows], name
        added = found["next_token_logprobs_P"].list.sum()
        for key, ids_T, total in zip(found["sample_id"], found["input_ids_T"], added, strict=True):
            np.testing.assert_array_equal(ids_T.to_numpy(), rows[key]["input_ids_T"])
            assert total == pytest.approx(sums[key], rel=1e-5)
    assert said["texts"]["sample_id"].to_pylist() == keys
    assert set(said["merged"]["sample_id"]) == set(keys)


def test_the_lines_for_ragged_entries_read_what_the_package_reads(said: dict[str, Any]) -> None:
    row = {
        "num_head_P": np.array([2, 0, 1], np.uint8),
        "num_tail_P": np.array([2, 3, 0], np.uint8),
        "head_ids_H": np.array([40_000, 3, 7], np.uint16),
        "head_codes_H": np.array([40, 20, 63], np.uint8),
        "tail_gaps_low_E": np.array([4, 200, 255, 1, 0], np.uint8),
        "tail_gaps_high_E": np.array([0, 100, 120, 0, 2], np.uint8),
    }
    ids, weights = said["tokens_of"](row)
    assert [len(each) for each in ids] == [4, 3, 1]
    for ids_K, weights_K, *expected in zip(ids, weights, *weighted_tokens(row), strict=True):
        np.testing.assert_array_equal(ids_K, expected[0][: len(ids_K)])
        np.testing.assert_allclose(weights_K, expected[1][: len(ids_K)], rtol=1e-6, atol=1e-7)


def test_half_precision_is_the_trap_that_the_page_says(said: dict[str, Any]) -> None:
    """polars 2.1: should it widen by itself one day, the page may say so."""
    bare = pl.read_ipc(said["signals"] / "shard-*.arrow")["next_token_logprobs_P"]
    assert bare.dtype == pl.List(pl.Float16)
    off = np.abs(bare.list.sum().cast(pl.Float64).to_numpy() - np.asarray(said["pyarrow_sums"]))
    assert off.max() > 0.01


def test_schema_json_says_what_the_shards_metadata_says(
    recipe: TinyRecipe, said: dict[str, Any]
) -> None:
    for name, table_name, variant in (
        ("documents", "documents", ""),
        ("signals", "teacher_logits", "threshold"),
    ):
        folder = recipe.step(name).folder
        body = json.loads((folder / "schema.json").read_text())
        table = TABLES[table_name, variant]
        assert (body["table"], body["variant"], body["version"]) == (
            table_name,
            variant,
            table.version,
        )
        schema = said["ds"].dataset(sorted(folder.glob("shard-*.arrow"))[0], format="ipc").schema
        assert [column["name"] for column in body["columns"]] == schema.names
        for column, field in zip(body["columns"], schema, strict=True):
            notes = {key.decode(): value.decode() for key, value in field.metadata.items()}
            assert column["type"] == str(field.type)
            assert {key: column[key] for key in ("doc", "dims", "unit")} == {
                "doc": "",
                "dims": "",
                "unit": "",
            } | notes
        manifest = json.loads((folder / "manifest.json").read_text())
        for key in ("vocab_size", "tokenizer"):
            assert body[key] == manifest[key], key
    assert said["about"]["sizes"] == {"K": 8}
    assert said["about"]["settings"]["encoding"] == {"kind": "threshold", "k": 8}


def test_a_table_finished_without_the_file_stays_finished(
    recipe: TinyRecipe, tmp_path: Path
) -> None:
    old = recipe.copy(tmp_path)
    for step in old.plan():
        (step.folder / "schema.json").unlink()
    before = stamps(old.root)
    assert set(old.run().states.values()) == {"done"} and stamps(old.root) == before
    assert teachercache("verify", old.root).code == 0
    folder = old.step("signals").folder
    (folder / "manifest.json").unlink()
    old.run()
    for name in ("schema.json", "manifest.json"):
        there = recipe.step("signals").folder / name
        assert (folder / name).read_bytes() == there.read_bytes(), name
