"""Stage ``token_files``: what is judged for a block of rows at once is judged as row by row."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError
from schemas.storage.manifest import read_manifest
from stages.sources.token_files.columnar import ROWS_AT_ONCE
from stages.stage import Rejected
from tests.fixtures.token_file_kinds import some_ids, token_recipe, write_tokens

pytestmark = pytest.mark.usefixtures("own_cache")

VOCABULARY = 512  # of the tiny model
OUTSIDE = "token_outside_vocabulary"
BAD: dict[pa.DataType, list[tuple[Any, str]]] = {
    pa.int16(): [
        ([3, -1, 4], OUTSIDE),
        ([3, VOCABULARY], OUTSIDE),
        ([5, None, -7], "null_in_ids"),
        (None, "missing_ids"),
    ]
}
BAD[pa.int32()] = [*BAD[pa.int16()], ([2**31 - 1, 4], OUTSIDE), ([-(2**31), 4], OUTSIDE)]
BAD[pa.int64()] = [
    *BAD[pa.int32()],
    ([3, 2**32 + 3], OUTSIDE),  # 3, were it cut to 32 bits
    ([-(2**32) + 3, 4], OUTSIDE),
]


@pytest.mark.parametrize("rows_per_shard", [10_000, 100])
@pytest.mark.parametrize("dtype", BAD, ids=str)
def test_a_bad_row_inside_a_block_costs_itself_alone(
    dtype: pa.DataType, rows_per_shard: int, tiny_model: Path, tmp_path: Path
) -> None:
    rows: list[Any] = [list(row) for row in dict.fromkeys(map(tuple, some_ids(3 * ROWS_AT_ONCE)))]
    expected: list[Any] = list(rows)
    for number, (row, reason) in enumerate(BAD[dtype]):
        at = ROWS_AT_ONCE + 20 + 9 * number  # inside the second of three blocks
        rows.insert(at, row)
        expected.insert(at, (f"ids.parquet row {at}", reason))
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(dtype))}), path)
    settings: dict[str, Any] = {"rows_per_shard": rows_per_shard, "max_rejected_fraction": 0.1}
    source = {"kind": "parquet", "paths": [str(path)]}
    recipe = token_recipe(tmp_path, tiny_model, source, heldout_fraction=0.0, **settings)
    stage: Any = recipe.step("ids").stage
    found = [
        (row.sample_id, row.reason) if isinstance(row, Rejected) else row.input_ids_T.tolist()
        for piece in stage.pieces()
        for row in stage.work.make_rows(stage, VOCABULARY, None, piece)
    ]
    assert found == expected


def test_rows_are_packed_without_opening_the_tokenizer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr("stages.sources.reading.tokens.open_tokenizer", opened.append)
    path = write_tokens(tmp_path, "parquet", [[5, 6, 7], [8, 9, 10]])
    source = {"kind": "parquet", "paths": [str(path)]}
    settings: dict[str, Any] = {"mode": "pack", "heldout_fraction": 0.0}
    recipe = token_recipe(tmp_path, tiny_model, source, length=4, **settings)
    recipe.run()
    totals = read_manifest(recipe.step("ids").folder)
    assert not opened and (totals.num_rows, totals.num_tokens) == (2, 8)  # 3 ids and the end, twice


def test_a_length_that_the_model_does_not_take_is_refused_for_packing(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = write_tokens(tmp_path, "parquet", some_ids(9))
    source = {"kind": "parquet", "paths": [str(path)]}
    recipe = token_recipe(tmp_path, tiny_model, source, mode="pack", length=300)
    with pytest.raises(ConfigError, match="length: got 300, but the model in"):
        recipe.run()
