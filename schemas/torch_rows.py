"""The rows of opened tables for torch's ``DataLoader``: each on one rank and in one worker.

This file alone imports torch, and nothing here imports this file: a user does, where it is used.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

from .dataset import CachedDataset


class ShardedRows(IterableDataset[dict[str, Any]]):
    """One epoch of this rank's rows, as numpy columns, each worker its share.

    The order is a permutation of all rows that depends on ``seed`` and the epoch alone
    (``CachedDataset.epoch_order``): ranks take every ``world_size``-th row of it and the workers of
    a rank take turns, so a row is on exactly one. Rank and ranks are those of torch.distributed
    where it runs, unless they are given. With ``drop_last`` all ranks have equally many rows: at
    most ``world_size - 1`` of an epoch are left out, others in each; without, none is.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        *,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
    ) -> None:
        """Wrap an opened data set; workers reopen its files."""
        runs = distributed.is_available() and distributed.is_initialized()
        self.dataset = dataset
        self.seed = seed
        self.rank = (distributed.get_rank() if runs else 0) if rank is None else rank
        found = distributed.get_world_size() if runs else 1
        self.world_size = found if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, expected one of 0 to {self.world_size - 1}")
        self.drop_last = drop_last
        # In memory that workers share: those that persist see it move.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Deal the rows anew at the next iteration, as samplers of torch do."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield what ``dataset[i]`` returns."""
        order = self.dataset.epoch_order(
            seed=self.seed,
            epoch=int(self._epoch),
            rank=self.rank,
            world_size=self.world_size,
        )
        if self.drop_last:
            order = order[: len(self.dataset) // self.world_size]
        worker = get_worker_info()
        if worker is not None:
            order = order[worker.id :: worker.num_workers]
        for index in order:
            yield self.dataset[int(index)]
