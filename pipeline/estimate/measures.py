"""What a probe measures: bytes over tokens, seconds over tokens or steps, and starts apart."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.planning.plan import PlannedStep
from pipeline.state.step_state import Progress
from schemas.storage.records import ShardRecord

_LEAST_SHARD_BYTES = 1000  # of an Arrow file's schema, at both ends


@dataclass(frozen=True, slots=True)
class Line:
    """A line through what was measured: ``start`` once, ``slope`` for each token, row or step."""

    start: float
    slope: float

    def at(self, amount: float) -> float:
        """Return what it comes to for an amount."""
        return self.start + self.slope * amount


def bytes_line(records: Iterable[ShardRecord]) -> Line:
    """Return the bytes of a shard over its tokens: shards of two sizes tell the file's own."""
    shards = [(record.num_tokens, record.num_bytes) for record in records if record.num_tokens]
    if not shards:
        return Line(0.0, 0.0)
    tokens_S, bytes_S = np.array(shards, float).T
    own = 0.0
    if len(set(tokens_S)) > 1:
        own = float(np.polyfit(tokens_S, bytes_S, 1)[1])
    own = min(max(own, _LEAST_SHARD_BYTES), 0.9 * float(bytes_S.min()))
    return Line(own, float((bytes_S.sum() - own * len(shards)) / tokens_S.sum()))


@dataclass
class Clock:
    """A reporter that notes when each shard was finished and each step of training was told."""

    said_line: Any
    began: float = field(default_factory=time.perf_counter)
    shards: list[tuple[float, ShardRecord]] = field(default_factory=list)
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.began

    def step_started(self, step: PlannedStep, progress: Progress) -> None:
        """Say nothing: the estimate names each step."""

    def said(self, line: str) -> None:
        """Say nothing."""

    def extending(self, line: str) -> None:
        """Say nothing: a probe copies no rows."""

    def engine_starting(self, what: str) -> None:
        """Say which engine starts, which takes a while."""
        self.said_line(f"starting {what}")

    def shards_expected(self, num_shards: int, num_finished: int) -> None:
        """Say nothing."""

    def shard_finished(self, record: ShardRecord) -> None:
        """Note when."""
        self.shards.append((self.seconds, record))

    def warned(self, line: str) -> None:
        """Pass it on."""
        self.said_line(line)

    def trained(self, values: dict[str, Any]) -> None:
        """Note when."""
        self.events.append((self.seconds, dict(values)))

    def step_finished(self, step: PlannedStep) -> None:
        """Say nothing."""

    def shard_line(self, tokens_of_inputs: Sequence[int]) -> Line:
        """Return the seconds over input tokens: the first shard warms up, and counts as start."""
        times = [when for when, _ in self.shards]
        total = self.seconds
        if len(times) < 2 or sum(tokens_of_inputs[1:]) == 0:
            return Line(0.0, total / max(1, sum(tokens_of_inputs)))
        slope = (times[-1] - times[0]) / sum(tokens_of_inputs[1:])
        return Line(max(0.0, total - slope * sum(tokens_of_inputs)), slope)

    def step_line(self) -> Line:
        """Return the seconds over training steps; of the trainer's reports the first warms up."""
        steps = [(when, event["step"]) for when, event in self.events if event["event"] == "step"]
        total = self.seconds
        if not steps:
            return Line(total, 0.0)
        if len(steps) < 2:
            begun = [when for when, event in self.events if event["event"] == "start"]
            slope = (steps[0][0] - (begun[0] if begun else 0.0)) / max(1, steps[0][1])
        else:
            slope = (steps[-1][0] - steps[0][0]) / (steps[-1][1] - steps[0][1])
        return Line(max(0.0, total - slope * steps[-1][1]), slope)

    def heldout_seconds(self) -> float:
        """Return how long the held-out rows took after training, 0 where there were none."""
        last = [when for when, event in self.events if event["event"] == "step"]
        after = [when for when, event in self.events if event["event"] == "after"]
        return after[-1] - last[-1] if last and after else 0.0


def folder_bytes(folder: Path) -> int:
    """Return what all files of a folder come to."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
