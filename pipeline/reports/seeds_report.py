"""Training steps that differ in their seed alone: means over seeds, differences with intervals."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from rich.table import Table

from pipeline.planning.plan import PlannedStep

COLUMNS = {
    "held-out cross-entropy": "cross_entropy",
    "KL to teacher": "kl_to_teacher",
    "top-1 agreement": "top1_agreement",
}
# What is measured of a student's own responses, where the teacher scored their tokens.
OF_RESPONSES = {"reverse KL to teacher": "reverse_kl", "staleness": "staleness"}
OF_SPANS = {"bits per byte": "bits_per_byte"}  # of students of aligned spans alone
# 0.975 quantiles of Student's t with 1 to 9 degrees of freedom.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True, slots=True)
class Group:
    """Steps that are one but for their seed: what they are called, read, and came to by seed."""

    name: str
    data: str
    metrics: Mapping[int, Mapping[str, float]]


def seeds_table(measured: Sequence[tuple[PlannedStep, Mapping[str, float]]]) -> Table | None:
    """Return means over seeds, then each group's difference to the first one of the same data.

    ``measured`` are training steps, each with its held-out metrics. Intervals are of 95 %, by
    Student's t over the seeds; a difference is paired by seed, over those that both have. None
    where no two steps differ in their seed alone.
    """
    groups = _groups(measured)
    if not groups:
        return None
    columns = columns_of([metrics for _, metrics in measured])
    table = Table("over seeds", "seeds", *columns, title="held-out rows, mean and 95 % interval")
    for group in groups:
        cells = [_cell(_values(group, group.metrics, name)) for name in columns.values()]
        table.add_row(group.name, str(len(group.metrics)), *cells)
    for index, group in enumerate(groups):
        first = next(other for other in groups if other.data == group.data)
        common = [seed for seed in group.metrics if seed in first.metrics]
        if first is not group and len(common) > 1:
            if index and table.rows:
                table.rows[-1].end_section = True
            cells = [_cell(_differences(group, first, common, name)) for name in columns.values()]
            table.add_row(f"{group.name} - {first.name}", str(len(common)), *cells)
    return table


def columns_of(found: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return the numbers to show of students: headers, and what they are called in metrics."""
    there = {name for metrics in found for name in metrics}
    some = {head: name for head, name in (OF_RESPONSES | OF_SPANS).items() if name in there}
    return COLUMNS | some


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean of independent values, at least two."""
    return _quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _quantile(freedom: int) -> float:
    """Return the 0.975 quantile of t; beyond the table by its expansion about the normal's."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _groups(measured: Sequence[tuple[PlannedStep, Mapping[str, float]]]) -> list[Group]:
    steps: dict[str, list[tuple[PlannedStep, Mapping[str, float]]]] = {}
    for step, metrics in measured:
        config = {**step.identity["config"]}
        config.pop("seed", None)
        key = json.dumps({**step.identity, "config": config}, sort_keys=True, default=str)
        steps.setdefault(key, []).append((step, metrics))
    found = []
    for members in steps.values():
        by_seed = {_seed(step): metrics for step, metrics in members}
        if len(by_seed) > 1:
            name = _common_name([step.name for step, _ in members])
            data = " ".join(step.fingerprint for step in members[0][0].inputs)
            found.append(Group(name, data, by_seed))
    return found


def _seed(step: PlannedStep) -> int:
    return int(step.identity["config"]["seed"])


def _common_name(names: Sequence[str]) -> str:
    """Return what the names begin with, without what leads to a number, else the first."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    opening = "".join(letters[0] for letters in alike)
    return opening.rstrip("_-0123456789").removesuffix("_seed") or names[0]


def _values(group: Group, seeds: Any, name: str) -> list[float]:
    return [group.metrics[seed][name] for seed in seeds if name in group.metrics[seed]]


def _differences(group: Group, first: Group, seeds: Sequence[int], name: str) -> list[float]:
    pairs = zip(_values(group, seeds, name), _values(first, seeds, name), strict=True)
    return [one - other for one, other in pairs]


def _cell(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    return f"{statistics.fmean(values):.3f} ± {half_width(values):.3f}"
