"""What may have happened, from which rows differ and whose values theirs are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.audit.sample import Sampled
from stages.signals.scoring.agreement import Compared

F64Array = npt.NDArray[np.float64]
_LEAST = 2  # values that have to agree before a row is said to be another's
_WIDESPREAD = 0.1  # of the rows: more have one cause
_CLOSE = 1 / 128  # of a value: stored ones have 7 significant bits


def diagnosis(
    rows: Sequence[Sampled], compared: Sequence[Compared], failed: Sequence[int]
) -> list[str]:
    """Return in a line each what the rows that differ, by index, have in common."""
    if not failed:
        return []
    lines = []
    shards = Counter(rows[at].shard.file for at in failed)
    sampled = Counter(row.shard.file for row in rows)
    is_widespread = len(shards) == len(sampled) and len(failed) > _WIDESPREAD * len(rows)
    shifted = Counter(step for at in failed for step in (1, -1) if _is_shifted(compared[at], step))
    for step, count in shifted.items():
        if 2 * count > len(failed):  # of less, two short rows may be alike by chance
            where = "the position before" if step == 1 else "the position after"
            lines.append(
                f"{count} of {len(failed)} rows have at each position what the live teacher says "
                f"at {where}: a shift by one"
            )
    for at in () if is_widespread else failed:
        other = _owner(compared, at)
        if other is not None:
            lines.append(f"{rows[at].place} has the values of {rows[other].place}: swapped")
    if is_widespread and not lines:
        lines.append(
            f"{len(failed)} of {len(rows)} rows differ, in every shard: another teacher (weights, "
            f"adapter, head), tokenizer, seed or dtype made the table"
        )
    if len(failed) < len(rows) and all(count == sampled[file] for file, count in shards.items()):
        lines.append(
            f"every sampled row of {', '.join(sorted(shards)[:3])} differs and no row of the other "
            f"shards: these shards were made by something else"
        )
    return lines[:10]


def _is_shifted(found: Compared, step: int) -> bool:
    """Whether stored values are those of the neighbours, and are not all alike."""
    stored_P, live_P = found.stored_P, found.live_P
    one, other = (stored_P[1:], live_P[:-1]) if step == 1 else (stored_P[:-1], live_P[1:])
    return _are_close(one, other) and not _are_close(stored_P, live_P)


def _owner(compared: Sequence[Compared], at: int) -> int | None:
    """Return the row, by index, whose live values stand in row ``at``."""
    stored_P = compared[at].stored_P
    if _are_close(stored_P, compared[at].live_P):
        return None
    for other, found in enumerate(compared):
        num = min(len(stored_P), len(found.live_P))
        if other != at and _are_close(stored_P[:num], found.live_P[:num]):
            return other
    return None


def _are_close(one: F64Array, other: F64Array) -> bool:
    near = np.abs(one - other) <= _CLOSE * np.abs(other) + 1e-3
    return len(one) >= _LEAST and bool(near.all())


def what_differs(found: Compared, measures: Mapping[str, Any], allowed: Mapping[str, float]) -> str:
    """Return in words the worst of what is not allowed of one row; "" where all is."""
    if found.problem:
        return found.problem
    worst, said = 1.0, ""
    for name, apart_P in found.apart.items():
        if not len(apart_P):
            continue
        at = int(np.argmax(np.where(np.isnan(apart_P), np.inf, apart_P)))
        ratio = np.inf if np.isnan(apart_P[at]) else apart_P[at] / allowed[name]
        if ratio > worst:
            worst = float(ratio)
            measure = measures[name]
            place = int(found.places_P[at]) if len(apart_P) == len(found.places_P) else at
            said = (
                f"{measure.of} differs by {apart_P[at]:.3g} {measure.unit} at position "
                f"{place}, allowed {allowed[name]:.2g}"
            )
    return said
