"""Which rows a process reads: the same in every step, however many processes share it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from schemas.errors import ConfigError
from stages.student.batches.step_rows import STAND_IN, StepLoader, StepRows, WithStandIn
from stages.student.losses.step import Term
from stages.student.train.stage import TrainConfig

SEED = 5


def config_of(batch_size: int, accumulation: int) -> TrainConfig:
    return TrainConfig(
        max_steps=1,
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )


def steps_of(config: TrainConfig, num_rows: int, *, epoch: int, processes: int) -> list[list[int]]:
    """The sorted rows of each step over all processes; checks what each process is given."""
    batch_size, accumulation = config.share(processes)
    steps: list[list[int]] = []
    for rank in range(processes):
        rows = StepRows(
            num_rows,
            batch_size=batch_size,
            accumulation=accumulation,
            seed=SEED,
            rank=rank,
            world_size=processes,
        )
        rows.set_epoch(epoch)
        batches = list(rows)
        assert len(batches) == len(rows)
        assert all(len(batch) <= batch_size for batch in batches)
        starts = range(0, len(batches), accumulation)
        parts = [batches[start : start + accumulation] for start in starts]
        mine = [[row for batch in part for row in batch] for part in parts]
        steps = steps or [[] for _ in mine]
        steps = [step + more for step, more in zip(steps, mine, strict=True)]
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(12, 1), (1, 12), (4, 3), (6, 2)])
@pytest.mark.parametrize("num_rows", [1, 12, 25, 47])
def test_a_step_has_the_same_rows_on_any_number_of_processes(
    batch_size: int, accumulation: int, num_rows: int
) -> None:
    config = config_of(batch_size, accumulation)
    seen = []
    for epoch in range(3):
        alone = steps_of(config, num_rows, epoch=epoch, processes=1)
        assert sorted(row for step in alone for row in step) == list(range(num_rows))
        for processes in (2, 3, 4, 6, 12):
            assert steps_of(config, num_rows, epoch=epoch, processes=processes) == alone
        seen.append(alone)
    assert num_rows < 25 or seen[0] != seen[1] != seen[2]  # an order for each epoch


def test_one_process_keeps_the_order_of_the_seed() -> None:
    """What a run of any earlier version read, so that its weights come out again."""
    rows = StepRows(10, batch_size=4, accumulation=2, seed=SEED)
    rows.set_epoch(2)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(SEED + 2)).tolist()
    assert list(rows) == [order[:4], order[4:8], order[8:]]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "share"),
    [
        (8, 4, 1, (8, 4)),
        (8, 4, 2, (8, 2)),
        (8, 1, 2, (4, 1)),
        (8, 3, 2, (4, 3)),
        (8, 4, 8, (4, 1)),
        (6, 4, 8, (3, 1)),
        (1, 6, 4, None),
        (4, 1, 3, None),
    ],
)
def test_batches_are_dealt_out_before_they_are_made_smaller(
    batch_size: int, accumulation: int, processes: int, share: tuple[int, int] | None
) -> None:
    config = config_of(batch_size, accumulation)
    if share is not None:
        assert config.share(processes) == share
        return
    rows = f"{batch_size} x {accumulation} = {batch_size * accumulation} rows"
    with pytest.raises(ConfigError, match=rf"{rows} .* over {processes} processes"):
        config.share(processes)


def collate(rows: Sequence[Any]) -> dict[str, Any]:
    return {"rows": [row.item() for row in rows]}


def test_a_process_without_rows_is_given_a_stand_in() -> None:
    data: Any = torch.arange(100, 105)
    rows = StepRows(5, batch_size=1, accumulation=1, seed=SEED, rank=3, world_size=4)
    loader = StepLoader(data, batch_sampler=rows, collate_fn=WithStandIn(collate, data[0]))
    first, second = list(loader)
    assert 100 <= first["rows"][0] <= 104 and STAND_IN not in first
    assert second == {"rows": [100], STAND_IN: True}
    assert isinstance(loader, DataLoader)
    loader.set_epoch(1)
    assert rows.epoch == 1


def test_a_stand_in_reaches_every_weight_with_nothing() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    term = Term(weight * 2, {"kl": torch.tensor(4.0)}, "samples", 0.5).without_effect()
    assert (term.unit, term.weight, float(term.sums["kl"])) == ("samples", 0.5, 0.0)
    term.total.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and float(weight.grad) == 0.0
