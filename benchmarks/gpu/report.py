"""What a part finds, kept in a file as it comes, and how much time is left to find more."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import Bar
from benchmarks.gpu.card import Card

ENOUGH = 15.0  # seconds that have to be left for one more measurement to begin


class Unavailable(Exception):
    """What is to be measured is not to be had here; the message says why."""


@dataclass(slots=True)
class Report:
    """Rows, bars and notes of one part; ``file`` holds them after each measurement.

    ``wrong`` counts what failed or was found wrong: a part with any ends with exit code 1.
    """

    part: str
    card: Card
    deadline: float  # of ``time.monotonic``
    file: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: int = 0

    def attempt(self, name: str, measure: Callable[[], None]) -> None:
        """Measure if there is time; what goes wrong becomes a line, and memory is freed."""
        left = self.deadline - time.monotonic()
        if left < ENOUGH:
            self.note(f"{name}: skipped, {max(left, 0.0):.0f} s of the time are left")
            return
        try:
            measure()
        except Unavailable as error:
            self.note(f"{name}: skipped, {error}")
        except torch.OutOfMemoryError:
            self.note(f"{name}: not measured, this card's memory is too small for it")
        except Exception as error:  # noqa: BLE001  kernels raise anything; the others go on
            self.wrong += 1
            self.note(f"{name}: failed, {one_line(error)}")
        finally:
            self.card.free()
            self.save()

    def note(self, text: str) -> None:
        """Say it now and keep it."""
        print(f"{self.part}: {text}", flush=True)
        self.notes.append(f"{self.part}: {text}")

    def row(self, **columns: Any) -> None:
        """Keep a row and say it now."""
        self.rows.append({"part": self.part, **columns})
        shown = (f"{name} {_short(value)}" for name, value in columns.items() if value is not None)
        print(f"{self.part}: {', '.join(shown)}", flush=True)

    def bar(self, bar: Bar) -> None:
        """Keep a bar."""
        self.bars.append({**bar, "name": f"{self.part}: {bar['name']}"})

    def save(self) -> None:
        """Write all there is: a part that is stopped leaves what it had."""
        if self.file is not None:
            names = ("rows", "bars", "notes", "wrong")
            body = {name: getattr(self, name) for name in names}
            self.file.write_text(json.dumps(body | {"card": self.card.describe()}, indent=1))


def one_line(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


def gigabytes(num_bytes: int | None) -> float | None:
    """Return 10^9 bytes, or None where nothing was measured."""
    return None if num_bytes is None else num_bytes / 1e9


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
