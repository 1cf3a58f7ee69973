"""What a run logs: means of the losses' parts over all processes, and events for the caller."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from stages.student.losses.step import UNITS, Term, Unit

OnEvent = Callable[[dict[str, Any]], None]
SPEED = "_per_s"  # what the names of speeds end with


class RunningSums:
    """Running sums of the terms' parts, left on the device until somebody asks."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.sums: dict[str, Tensor] = {}
        self.units: dict[str, Unit] = {}
        self.counts = [0] * len(UNITS)
        self.begin()

    def begin(self) -> None:
        """Start the clock that speeds are told by."""
        self.clock = time.monotonic()

    def add(self, terms: Sequence[Term], counts: Sequence[int]) -> None:
        """Take in one batch: its terms and its counts of ``UNITS``."""
        for term in terms:
            for name, value in term.sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.units[name] = term.unit
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]

    def take(self, device: torch.device, reduce: Callable[..., Any]) -> dict[str, float]:
        """Return the means over all processes, the counts and speeds; start again at zero."""
        values = [value.float().reshape(()) for value in self.sums.values()]
        local_S = torch.stack([*values, *torch.tensor(self.counts, device=device).float()])
        totals = reduce(local_S, reduction="sum").tolist()
        counted = dict(zip(UNITS, totals[-len(UNITS) :], strict=True))
        used = {unit: n for unit, n in counted.items() if n or unit != "answer_tokens"}
        found = {f"num_{unit}": count for unit, count in used.items()}
        means = {
            name: total / max(counted[self.units[name]], 1.0)
            for name, total in zip(self.sums, totals, strict=False)  # the counts come last
        }
        seconds = max(time.monotonic() - self.clock, 1e-9)
        speeds = {f"{unit}{SPEED}": count / seconds for unit, count in used.items()}
        self.sums, self.counts = {}, [0] * len(UNITS)
        self.begin()
        return means | found | speeds


def without_speeds(entry: Mapping[str, float]) -> dict[str, float]:
    """Return what a step logged that is the same in every run."""
    return {name: value for name, value in entry.items() if not name.endswith(SPEED)}


def speeds_of(entry: Mapping[str, float]) -> dict[str, float]:
    """Return a step's number and how fast it was."""
    speeds = {name: value for name, value in entry.items() if name.endswith(SPEED)}
    return {"step": entry["step"], **speeds} if speeds else {}


class EventReporter(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Turns the Trainer's logs into events: ``start`` once, then ``step`` with its numbers."""

    def __init__(self, on_event: OnEvent) -> None:
        """``on_event`` is given each event."""
        self.on_event = on_event

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the number of steps."""
        self._tell("start", state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell a step's numbers and how fast it was."""
        if logs and "loss" in logs:
            self._tell("step", state, **logs)

    def _tell(self, event: str, state: TrainerState, **values: float) -> None:
        place = {"event": event, "step": state.global_step, "max_steps": state.max_steps}
        self.on_event(place | values)
