"""What a task does: it runs the ``teachercache`` command, and ends it when it is ended."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from airflow.sdk import Asset, BaseOperator, BaseOperatorLink, Context
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowSkipException,
)
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

    def follow(self, arguments: Sequence[str], call: Call) -> str:
        """Run ``teachercache`` with these words on this machine; return its last line."""
        self.log.info("DS=%s teachercache %s", call.date, shlex.join(arguments))
        self._process = Process(arguments, call)
        return self._process.follow(self.log.info)

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
    """Let a live teacher make a sample of each finished signal again; its verdict is an event.

    Where no signal is finished for the run's date, or the recipe has no plan for it, the task is
    skipped. Raises AirflowFailException, in one line, for a table that is not its teacher's.
    """

    def __init__(self, *, asset: Asset, **options: Any) -> None:
        super().__init__(outlets=[asset], **options)
        self.asset = asset

    def execute(self, context: Context) -> None:
        """Audit, then say what was found, by step."""
        (call,) = calls(context, self.recipe)
        try:
            steps = read_plan(call)
        except AirflowFailException as error:  # of a date without text, say; its own DAG fails
            raise AirflowSkipException(f"there is no plan for {call.date}: {error}") from error
        if not any(map(_is_signal, steps.values())):
            raise AirflowSkipException("no signal is finished yet")
        problem = ""
        try:
            self.carry_out(call, context)
        except AirflowFailException:
            raise
        except AirflowException as error:
            problem = str(error)
        verdicts = {
            name: step["audit"] for name, step in read_plan(call).items() if step.get("audit")
        }
        wrong = [name for name, verdict in verdicts.items() if verdict["outcome"] == "unfaithful"]
        if wrong:
            found = ", ".join(
                f"{name} ({verdicts[name]['num_rows']} rows audited)" for name in wrong
            )
            raise AirflowFailException(
                f"not what the live teacher says: {found}; `teachercache audit {self.recipe}` "
                f"shows the rows"
            )
        if problem:
            raise AirflowException(problem)
        context["outlet_events"][self.asset].extra = {"date": call.date, "verdicts": verdicts}


def _is_signal(step: Mapping[str, Any]) -> bool:
    return bool(step["state"] == "done" and step["has_audit"])


class ReportLink(BaseOperatorLink):
    """The button of a task that leads to the page it made."""

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        """Return where the page is; nothing of a task that made none."""
        from airflow.sdk.execution_time.xcom import XCom  # not to parse DAGs

        return str(XCom.get_value(ti_key=ti_key, key=REPORT) or "")


REPORT = "report"  # the XCom that holds a page's address


class ReportOperator(TeachercacheOperator):
    """Make the page of a run, and link to it; skipped where the command cannot draw one."""

    operator_extra_links = (ReportLink(),)

    def carry_out(self, call: Call, context: Context) -> None:
        """Make it, and keep its address for the link."""
        try:
            place = self.follow(call.arguments(*self.words), call)
        except AirflowFailException as error:
            if "teachercache[report]" in str(error):
                raise AirflowSkipException(str(error)) from error
            raise
        context["ti"].xcom_push(key=REPORT, value=address_of(place))


def address_of(place: str) -> str:
    """Return what leads to a page: below ``TEACHERCACHE_REPORTS_URL``, else where it lies."""
    served = os.environ.get("TEACHERCACHE_REPORTS_URL")
    if served:
        return f"{served.rstrip('/')}/{PurePosixPath(place).name}"
    return place if "://" in place else PurePosixPath(place).as_uri()
