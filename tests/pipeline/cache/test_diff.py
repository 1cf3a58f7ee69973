"""``teachercache diff``: settings, rows and values in which two tables differ, and nothing else."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.cache.diff import difference
from pipeline.cache.distances import decoded, total_variation
from schemas.dataset import open_dataset
from schemas.open_table import OpenTable, known_table
from schemas.storage.manifest import read_manifest, write_manifest
from schemas.storage.shards import read_shard, write_shard
from tests.fixtures.tiny_recipe import ROWS_PER_SHARD, TinyRecipe, teachercache

VOCAB_SIZE, K = 512, 8
OTHER_SHARDS = f"steps.documents.rows_per_shard={ROWS_PER_SHARD - 3}"


@pytest.fixture
def signals(copied: TinyRecipe) -> Path:
    return copied.step("signals").folder


def rewritten(
    folder: Path, to: Path, change: Callable[[list[Any]], list[Any]], shard: int = 0
) -> Path:
    """Copy a table and write one shard of it anew with the rows that ``change`` makes of them."""
    shutil.copytree(folder, to)
    manifest = read_manifest(folder)
    table = known_table(manifest, folder)
    bound = table.bind(vocab_size=manifest.vocab_size, sizes={"K": K})
    records = list(manifest.shards)
    record = records[shard]
    batches = read_shard(folder / record.file).to_batches()
    rows = change([row for batch in batches for row in table.rows(batch)])
    written = write_shard(to / record.file, bound, rows)
    records[shard] = replace(
        record,
        num_rows=written.num_rows,
        num_tokens=sum(row.num_tokens for row in rows),
        num_positions=sum(row.num_positions for row in rows),
        num_bytes=written.num_bytes,
        sha256=written.sha256,
    )
    write_manifest(to, replace(manifest, shards=records))
    return to


def test_equal_rows_in_other_shards_are_equal(copied: TinyRecipe) -> None:
    """The settings differ, the rows do not: exit code 0."""
    copied.only("documents").run(OTHER_SHARDS)
    other = copied.step("documents", OTHER_SHARDS).folder
    said = teachercache("diff", copied.step("documents").folder, other)
    assert said.code == 0, said
    assert f"  config.rows_per_shard: {ROWS_PER_SHARD} | {ROWS_PER_SHARD - 3}\n" in said.out
    assert said.out.count(" | ") == 2  # the line above it, and this one setting
    num_rows = read_manifest(other).num_rows
    assert f"rows: {num_rows} in both, 0 in A alone, 0 in B alone" in said.out
    assert said.out.endswith("rows of both that differ: 0\n")


def test_one_value_of_one_row(signals: Path, tmp_path: Path) -> None:
    names = []

    def change(rows: list[Any]) -> list[Any]:
        entropies_P = rows[2].entropies_P.copy()
        entropies_P[5] += np.float16(0.5)
        names.append(rows[2].sample_id)
        return [*rows[:2], replace(rows[2], entropies_P=entropies_P), *rows[3:]]

    other = rewritten(signals, tmp_path / "other", change, shard=1)
    found = difference(signals, other)
    assert (found.num_differing, found.first) == (1, names)
    assert list(found.columns) == ["entropies_P"] and not found.settings
    column = found.columns["entropies_P"]
    before, after = (open_dataset([f], split=None) for f in (signals, other))
    at = next(i for i in range(len(before)) if before[i]["sample_id"] == names[0])
    a, b = (np.float64(rows[at]["entropies_P"]) for rows in (before, after))
    assert (column.num_rows, column.num_reshaped, column.first) == (1, 0, names)
    assert column.most == abs(a - b).max() and 0.4 < column.most < 0.6
    assert column.mean == pytest.approx(abs(a - b).mean())
    assert found.apart == 0  # the distributions are as they were
    said = teachercache("diff", signals, other)
    assert said.code == 1 and f"rows of both that differ: 1 ({names[0]})" in said.out


def test_rows_that_only_one_has(signals: Path, tmp_path: Path) -> None:
    gone: list[str] = []

    def change(rows: list[Any]) -> list[Any]:
        gone.extend(row.sample_id for row in rows[:2])
        return rows[:1:-1]  # the others turned around

    other = rewritten(signals, tmp_path / "other", change)
    said = teachercache("diff", signals, other)
    assert said.code == 1 and "2 in A alone, 0 in B alone" in said.out
    assert f"  in A alone: ({', '.join(sorted(gone))})" in said.out
    assert said.out.endswith("rows of both that differ: 0\n")
    assert teachercache("diff", other, signals).out.count("0 in A alone, 2 in B alone") == 1


def test_another_encoding_is_told_by_the_distributions(copied: TinyRecipe, signals: Path) -> None:
    top_k = "steps.signals.encoding={kind: top_k, k: 6}"
    copied.only("documents", "signals").run(top_k)
    other = copied.step("signals", top_k).folder
    found = difference(signals, other)
    places = [place for place, _, _ in found.settings]
    assert places == ["config.encoding.k", "config.encoding.kind", "table[2]"]
    apart, rows = [], [open_dataset([folder], split=None) for folder in (signals, other)]
    for a, b in zip(*rows, strict=True):
        assert a["sample_id"] == b["sample_id"]
        apart.append(dense_total_variation(a, b))
    flat = np.concatenate(apart)
    assert found.num_positions == flat.size == read_manifest(other).num_positions
    assert found.apart / flat.size == pytest.approx(flat.mean(), abs=1e-6)
    assert found.most_apart == pytest.approx(flat.max(), abs=1e-6)
    assert found.num_differing == len(apart)


def dense_total_variation(threshold: dict[str, Any], top_k: dict[str, Any]) -> Any:
    """From dense rows of the vocabulary and one more entry for the rest, in plain numpy."""
    num_positions = len(threshold["token_ids_PK"])
    dense = np.zeros((2, num_positions, VOCAB_SIZE + 1))
    ids_PK, weights_PK, _ = decoded(threshold, "threshold")  # type: ignore[misc]
    for position in range(num_positions):
        for token, weight in zip(ids_PK[position], weights_PK[position], strict=True):
            dense[0, position, token] += weight
        probs_K = np.exp(top_k["logprobs_PK"][position].astype(np.float64))
        dense[1, position, top_k["token_ids_PK"][position]] = probs_K
        dense[1, position, -1] = np.exp(np.float64(top_k["rest_logprobs_P"][position]))
    return np.abs(dense[0] - dense[1]).sum(axis=1) / 2


def test_total_variation_of_distributions_one_can_work_out_by_hand() -> None:
    ids, none = np.array([[3, 7], [1, 1]]), np.zeros(2)
    a = (ids, np.array([[0.75, 0.25], [1.0, 0.0]]), none)  # id 1 stands twice, once of weight 0
    b = (np.array([[7, 9], [2, 1]]), np.array([[0.5, 0.25], [0.5, 0.25]]), np.array([0.25, 0.25]))
    # |0.75 - 0| + |0.25 - 0.5| + |0 - 0.25| + rest 0.25; |1 - 0.25| + 0.5 + rest 0.25
    assert total_variation(a, b).tolist() == [0.75, 0.75]
    assert total_variation(a, a).tolist() == [0.0, 0.0]


def test_rows_are_read_shard_by_shard(
    copied: TinyRecipe, signals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record batch of a shard that differs is read once, of an equal shard none."""
    other = rewritten(signals, tmp_path / "other", lambda rows: rows[1:], shard=2)
    read: list[tuple[Path, int]] = []
    content = OpenTable._content

    def counted(table: OpenTable, shard: int, batch: int) -> pa.RecordBatch:
        assert isinstance(table.folder, Path)
        read.append((table.folder, shard))
        return content(table, shard, batch)

    monkeypatch.setattr(OpenTable, "_content", counted)
    found = difference(signals, other)
    assert len(found.only_a) == 1 and found.num_differing == 0
    assert sorted(read) == sorted([(signals, 2), (other, 2)])  # 8 rows, one record batch each


def test_tables_of_two_kinds_and_a_damaged_one_are_one_line(
    copied: TinyRecipe, signals: Path
) -> None:
    documents = copied.step("documents").folder
    said = teachercache("diff", documents, signals)
    assert said.code == 2 and "give two of one kind" in said.error
    shard = min(signals.glob("*.arrow"))
    shutil.copytree(signals, copied.root / "whole")
    shard.write_bytes(shard.read_bytes()[:-1])
    said = teachercache("diff", copied.root / "whole", signals)
    assert said.code == 1 and "has sha256" in said.error
    said = teachercache("diff", copied.step("student").folder, signals)
    assert said.code == 1 and "holds no table" in said.error
