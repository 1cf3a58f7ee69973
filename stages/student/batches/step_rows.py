"""Which rows each process reads in each step: those of one process, dealt out in turn.

A step takes the next ``batch_size * accumulation * world_size`` rows of an order that seed and
epoch fix, so a run on more or fewer processes takes the same rows in the same step, and so does one
that goes on after a change. The last step of an epoch has the rows that are left, none twice: a
process for which there is none still has to take part in the backward pass, and is given a stand-in
that counts nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

STAND_IN = "stand_in"


class StepRows(Sampler[list[int]]):
    """The batches of process ``rank``, as lists of indices; an empty one asks for a stand-in."""

    def __init__(
        self,
        num_rows: int,
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """``batch_size`` and ``accumulation`` are those of one process."""
        self.num_rows, self.batch_size, self.accumulation = num_rows, batch_size, accumulation
        self.rank, self.world_size = rank, world_size
        self.seed, self.epoch = seed, 0

    @property
    def rows_per_step(self) -> int:
        """The rows of one step over all processes; the last step of an epoch may have fewer."""
        return self.batch_size * self.accumulation * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield ``accumulation`` batches for each step, in the last one at least one."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator)
        for first in range(0, self.num_rows, self.rows_per_step):
            step = order[first : first + self.rows_per_step]
            mine = step[self.rank :: self.world_size].tolist()
            for start in range(0, max(len(mine), 1), self.batch_size):
                yield mine[start : start + self.batch_size]

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        steps, left = divmod(self.num_rows, self.rows_per_step)
        mine = len(range(self.rank, left, self.world_size))
        last = max(-(-mine // self.batch_size), 1) if left else 0
        return steps * self.accumulation + last


class StepLoader(DataLoader[dict[str, Any]]):
    """A loader over ``StepRows`` that passes the epoch on."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        assert isinstance(self.batch_sampler, StepRows)
        self.batch_sampler.set_epoch(epoch)


@dataclass(frozen=True, slots=True)
class WithStandIn:
    """Collate rows; for none, a batch of ``row`` that is marked with ``STAND_IN``."""

    collate: Callable[[Sequence[Any]], dict[str, Any]]
    row: Any

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return one batch."""
        return self.collate(rows) if rows else self.collate([self.row]) | {STAND_IN: True}


def counts_of(batch: dict[str, Any]) -> tuple[int, int, int]:
    """Return a batch's counts of ``UNITS`` (``losses.step``), for losses to be divided by.

    The answers of ``IclCollator`` and ``DpoCollator`` count as samples, so only running text has
    tokens there; both sequences of a preference pair are one sample.
    """
    if STAND_IN in batch:
        return 0, 0, 0
    if "answers" in batch:
        text = batch.get("lm")
        return len(text["positions_N"]) if text else 0, len(batch["answers"]), 0
    num_samples = batch.get("num_samples", len(batch["input_ids"]))
    in_answer = int(batch["in_answer_N"].sum()) if "in_answer_N" in batch else 0
    return len(batch["positions_N"]), num_samples, in_answer
