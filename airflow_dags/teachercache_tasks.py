"""What a task does: it runs the ``teachercache`` command, and ends it when it is ended."""

import shlex
from collections.abc import Sequence
from typing import Any

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowSkipException
from teachercache_command import Call, Process, calls, read_plan, tables_of


class TeachercacheOperator(BaseOperator):
    """Run ``teachercache`` with ``arguments`` on this worker, its lines in the task's log.

    ``shards`` (``0:16``) is what a mapped task makes of a step. Killed or timed out, the task takes
    the command and all it started with it; what shards were finished stay.
    """

    def __init__(
        self, *, recipe: str, arguments: Sequence[str], shards: str | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.recipe, self.arguments, self.shards = recipe, list(arguments), shards
        self._process: Process | None = None

    @property
    def words(self) -> list[str]:
        """The command's arguments."""
        return [*self.arguments, *(["--shards", self.shards] if self.shards else [])]

    def execute(self, context: Context) -> None:
        """Run the command, once for each date that the run is about."""
        for call in calls(context, self.recipe):
            self.carry_out(call, context)

    def carry_out(self, call: Call, context: Context) -> None:
        """Run the command to its end."""
        self.follow(call.arguments(*self.words), call)

    def follow(self, arguments: Sequence[str], call: Call) -> None:
        """Run ``teachercache`` with these words on this machine."""
        self.log.info("DS=%s teachercache %s", call.date, shlex.join(arguments))
        self._process = Process(arguments, call)
        self._process.follow(self.log.info)

    def on_kill(self) -> None:
        """End the command."""
        if self._process is not None:
            self._process.end()


class VerifyOperator(TeachercacheOperator):
    """Check every byte of the tables that a run is about."""

    def carry_out(self, call: Call, context: Context) -> None:
        """Find the tables, then look at them."""
        tables = tables_of(read_plan(call))
        self.follow(["verify", *(step["folder"] for step in tables.values())], call)


class AuditOperator(TeachercacheOperator):
    """Hold the finished signals of a recipe to a live teacher; skipped where there are none.

    The verdicts go out with the task's asset, the first of ``outlets``. One that is not faithful
    fails the task.
    """

    def carry_out(self, call: Call, context: Context) -> None:
        """See what there is, audit it, tell what was found."""
        if not any(step["audit"] for step in read_plan(call).values()):
            raise AirflowSkipException(f"DS={call.date}: no finished table of signals to audit")
        self.follow(call.arguments("audit"), call)
        verdicts = {name: step["audit"] for name, step in read_plan(call).items() if step["audit"]}
        context["outlet_events"][self.outlets[0]].extra = {"date": call.date, "audit": verdicts}
