"""Rows for torch's loaders: each on one rank and in one worker, in an order that repeats."""

from typing import Any

import pytest
from torch.utils.data import DataLoader

from schemas.dataset import CachedDataset, open_dataset
from schemas.torch_rows import ShardedRows
from tests.fixtures.cached_data import make_cached_data


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CachedDataset:
    data = make_cached_data(tmp_path_factory.mktemp("cache"))
    return open_dataset(data.tables("threshold"))  # 24 rows


def names(rows: ShardedRows, **settings: Any) -> list[str]:
    loader = DataLoader(rows, batch_size=None, collate_fn=dict, **settings)
    return [row["sample_id"] for row in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_row_is_on_one_rank_and_in_one_worker(
    num_workers: int, dataset: CachedDataset
) -> None:
    seen = [
        name
        for rank in range(5)
        for name in names(ShardedRows(dataset, rank=rank, world_size=5), num_workers=num_workers)
    ]
    assert sorted(seen) == sorted(dataset[index]["sample_id"] for index in range(24))


def test_ranks_have_equally_many_rows_if_asked(dataset: CachedDataset) -> None:
    seen = [names(ShardedRows(dataset, rank=r, world_size=5, drop_last=True)) for r in range(5)]
    assert [len(each) for each in seen] == [4] * 5
    assert len({name for each in seen for name in each}) == 20


def test_an_epoch_and_a_seed_give_one_order(dataset: CachedDataset) -> None:
    first = names(ShardedRows(dataset, seed=1))
    rows = ShardedRows(dataset, seed=1)
    assert names(rows) == names(rows) == first
    rows.set_epoch(1)
    assert names(rows) != first and sorted(names(rows)) == sorted(first)
    assert names(ShardedRows(dataset, seed=2)) != first


def test_workers_that_persist_see_the_epoch_move(dataset: CachedDataset) -> None:
    rows = ShardedRows(dataset)
    settings: dict[str, Any] = {"num_workers": 1, "persistent_workers": True}
    loader = DataLoader(rows, batch_size=None, collate_fn=dict, **settings)
    first = [row["sample_id"] for row in loader]
    rows.set_epoch(1)
    second = [row["sample_id"] for row in loader]
    rows.set_epoch(0)
    assert second != first == [row["sample_id"] for row in loader]


def test_a_rank_that_is_none_is_refused(dataset: CachedDataset) -> None:
    with pytest.raises(ValueError, match="rank is 2, expected one of 0 to 1"):
        ShardedRows(dataset, rank=2, world_size=2)
