"""After how many student runs the cache is cheaper than a live teacher, from measured times.

For a training step that reads signals s of a model, each with a capture time ``C_s`` (the seconds
that its shards' records tell) for ``R_s`` rows, and that reads ``n`` rows in a run:

    capture C = sum_s C_s        live teacher L = n sum_s C_s / R_s        reading r = n sum_s r_s

where ``r_s`` is what reading and decoding a row of the table took when the page was made. With the
cache N runs cost ``C + N r``, with a live teacher ``N L``: equal at ``N* = C / (L - r)``. Both
leave out what they share, the student's own work. Rows that are held out count in C: they are
captured as well. Running text of ``lm_data`` is left out of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.planning.data_sets import data_sets
from pipeline.planning.plan import PlannedStep
from pipeline.reports.step_times import MeasuredTime
from stages.student.train.stage import TrainStage


@dataclass(frozen=True, slots=True)
class Signal:
    """What is measured of a finished table that a model's run left."""

    num_rows: int
    made: MeasuredTime
    read_s_a_row: float | None


@dataclass(frozen=True, slots=True)
class BreakEven:
    """The cost of one training step, in seconds; ``missing`` says what is not known, or ""."""

    student: str
    signals: tuple[str, ...]
    num_rows: int = 0
    capture_s: float = 0.0
    live_s: float = 0.0
    reading_s: float = 0.0
    missing: str = ""

    @property
    def runs(self) -> float | None:
        """N*; None where it is not known, or where no number of runs repays the capture."""
        saved = self.live_s - self.reading_s
        return None if self.missing or saved <= 0 else self.capture_s / saved


def break_evens(
    steps: Sequence[PlannedStep],
    signals: Mapping[str, Signal],
    rows_read: Mapping[str, float],
) -> list[BreakEven]:
    """Return the break-even of each training step that reads a model's signals.

    ``signals`` are by step, of those that are finished and readable; ``rows_read`` is how many rows
    each finished training step read.
    """
    found = []
    for step in steps:
        if isinstance(step.stage, TrainStage):
            data = step.inputs[: len(step.stage.data)]
            read = [source for source in data if source.identity.get("models")]
            if read:
                found.append(_break_even(step, read, signals, rows_read.get(step.name)))
    return found


def _break_even(
    step: PlannedStep,
    read: Sequence[PlannedStep],
    signals: Mapping[str, Signal],
    num_rows: float | None,
) -> BreakEven:
    names = tuple(source.name for source in read)
    shares = _shares(step, signals)
    capture_s, live_s, reading_s = 0.0, 0.0, 0.0
    for source in read:
        signal = signals.get(source.name)
        if signal is None or signal.read_s_a_row is None:
            return BreakEven(step.name, names, missing=f"'{source.name}' has no rows to look at")
        if signal.made.seconds is None or not signal.made.num_rows:
            return BreakEven(step.name, names, missing=f"'{source.name}' tells no times")
        if num_rows is None:
            return BreakEven(step.name, names, missing="the student is not trained yet")
        made_s_a_row = signal.made.seconds / signal.made.num_rows
        capture_s += made_s_a_row * signal.num_rows
        rows_told = shares.get(source.name, 1.0) * num_rows
        live_s += made_s_a_row * rows_told
        reading_s += signal.read_s_a_row * rows_told
    return BreakEven(step.name, names, round(num_rows or 0), capture_s, live_s, reading_s)


def _shares(step: PlannedStep, signals: Mapping[str, Signal]) -> dict[str, float]:
    """Return, of several data sets, which share of a run's rows each signal is about."""
    found = [[source.name for source in own if source.name in signals] for own in data_sets(step)]
    most = [max((signals[name].num_rows for name in own), default=0) for own in found]
    total = max(1, sum(most))
    shares: dict[str, float] = {}
    for own, num_rows in zip(found, most, strict=True):
        for name in own:  # one table may tell rows of two data sets
            shares[name] = shares.get(name, 0.0) + num_rows / total
    return shares
