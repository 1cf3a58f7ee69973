"""What a run prints while it works: a bar on a terminal, plain log lines elsewhere."""

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.planning.plan import PlannedStep
from pipeline.state import step_state
from schemas.errors import redacted
from schemas.storage.records import ShardRecord

LINE_EVERY_S = 10.0


@dataclass
class _Made:
    """Sums over the shards that this run made of a step."""

    shards: int = 0
    rows: int = 0
    tokens: int = 0
    positions: int = 0
    bytes: int = 0
    rejects: int = 0

    def add(self, record: ShardRecord) -> None:
        self.shards += 1
        self.rows += record.num_rows
        self.tokens += record.num_tokens
        self.positions += record.num_positions
        self.bytes += record.num_bytes
        self.rejects += sum(record.rejects.values())


@dataclass
class ConsoleReporter:
    """Rows, tokens per second, bytes per token and time left, for one step at a time."""

    console: Console
    _bars: Progress | None = None
    _task: TaskID | None = None
    _label: str = ""
    _clock: float = field(default_factory=time.monotonic)
    _last_line: float = field(default_factory=time.monotonic)
    _expected: int = 0
    _before: int = 0
    _logged: int = 0  # the step of the last loss
    _made: _Made = field(default_factory=_Made)

    def step_started(self, step: PlannedStep, progress: step_state.Progress) -> None:
        """Say what begins, or that it is done already."""
        self._label = step.name
        self._clock = self._last_line = time.monotonic()
        self._made, self._expected, self._before, self._logged = _Made(), 0, 0, 0
        if progress.state == "done":
            self._say(f"done already ({step.stage.stage}): {progress.why}, {step.place}")
        else:
            self._say(f"{step.stage.stage}: {progress.why}; writing {step.place}")

    def said(self, line: str) -> None:
        """Pass a line on, now and then."""
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._say(line)

    def extending(self, line: str) -> None:
        """Say at once what is copied."""
        self._say(line)

    def engine_starting(self, what: str) -> None:
        """Say at once what the silence is about."""
        self._say(f"starting {what}")

    def shards_expected(self, num_shards: int, num_finished: int) -> None:
        """Begin to count shards."""
        self._expected, self._before = num_shards, num_finished
        if num_finished < num_shards:  # of an extension: its new rows, then all
            self._made = _Made()
        if num_finished:
            self._say(f"{num_finished} of {num_shards} shards are finished already")
        self._start_bar(num_shards, num_finished)

    def shard_finished(self, record: ShardRecord) -> None:
        """Count one more shard and say how fast it goes."""
        self._made.add(record)
        # A shard that was counted as kept and has changed since is made again, last of all.
        done = min(self._before + self._made.shards, self._expected)
        self._advance(1, self._rates(), done, self._expected, "shards")

    def warned(self, line: str) -> None:
        """Say at once what went wrong and is being made good."""
        self._say(redacted(line))

    def trained(self, values: dict[str, Any]) -> None:
        """Show a training step's loss, or the numbers of an evaluation."""
        event = values.get("event", "step")
        if event == "start":
            self._before = self._logged = int(values.get("step", 0))
            self._start_bar(int(values["max_steps"]), self._before)
        elif event == "step":
            speed = f"{values.get('tokens_per_s', 0.0):.0f} tokens/s"
            if not values.get("tokens_per_s"):  # a loss on answers alone scores no running text
                speed = f"{values.get('samples_per_s', 0.0):.1f} samples/s"
            step = int(values["step"])
            over = step - self._logged
            mean = f" (mean of {over} steps)" if over > 1 else ""
            self._logged = step
            text = f"loss {values['loss']:.3f}{mean}, {speed}"
            self._advance(1, text, step, int(values["max_steps"]), "steps")
        elif event == "rows":
            self._say(
                f"trains on {values['rows']:,} rows; {values['missing']:,} more have no row in one "
                f"of the tables and are left out"
            )
        else:
            numbers = [f"{k} {v:.3f}" for k, v in values.items() if isinstance(v, float)]
            self._say(f"{event}: {', '.join(numbers)}")

    def step_finished(self, step: PlannedStep) -> None:
        """Close the bar and say what the step came to."""
        self.close()
        seconds = time.monotonic() - self._clock
        detail = f", {self._rates()}" if self._made.shards else ""
        self._say(f"finished in {seconds:.1f} s{detail}")

    def close(self) -> None:
        """Take the bar off the terminal, which also gives its cursor back."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._clock, 1e-9)
        made = self._made
        rejected = f", {made.rejects} rejected" if made.rejects else ""
        unit = "position" if made.positions else "token"
        per_token = f"{made.bytes / max(made.positions or made.tokens, 1):.1f} B/{unit}"
        return f"{made.rows} rows, {made.tokens / seconds:.0f} tokens/s, {per_token}{rejected}"

    def _start_bar(self, total: int, done: int) -> None:
        if not self.console.is_terminal:
            return
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        self._task = self._bars.add_task(self._label, total=total, completed=done, text="")
        self._bars.start()

    def _advance(self, count: int, text: str, done: int, total: int, unit: str) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._last_line < LINE_EVERY_S and done != total:
            return
        self._last_line = now
        made = max(done - self._before, count)
        left_s = (now - self._clock) / made * (total - done)
        self._say(f"{done}/{total} {unit}, {text}, about {left_s:.0f} s left")

    def _say(self, text: str) -> None:
        step = f"[{self._label}] " if self._label else ""  # a command about no step has no name
        self.console.print(f"{step}{text}", markup=False, highlight=False, soft_wrap=True)
