"""The verdict of an audit as a person reads it, and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.state.audit_verdict import AuditVerdict


def print_verdict(console: Console, name: str, verdict: AuditVerdict) -> None:
    """Say what was found, what is allowed, and of each row that differs what differs."""
    settings = verdict.settings

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    say(
        f"{name}: {verdict.outcome}, {verdict.num_rows:,} rows ({settings['whole_rows']:,} to the "
        f"end), {verdict.num_positions:,} positions, live teacher in {verdict.engine} (made in "
        f"{settings['made_in']}, {settings['dtype']})"
    )
    if verdict.num_rows:
        console.print(_measures(verdict.measures))
        say(
            f"finds a fault in {_percent(settings['finds_in_rows'])} of rows with 99 % (one "
            f"not at their beginning: {_percent(settings['finds_at_any_position'])}); of faithful "
            f"tables it refuses at most {_percent(settings['false_alarm_rate'])}"
        )
        say(
            f"cost: {settings['tokens_read']:,} tokens read, {_percent(settings['cost'])} of the "
            f"capture, {settings['seconds']:g} s"
        )
    if verdict.truncation:
        left = ", ".join(f"{name} {value:.4g}" for name, value in verdict.truncation.items())
        say(f"truncation, of the encoding against the whole distribution: {left}")
    for line in verdict.failures:
        say(f"  {line}")
    if (more := settings["num_failed"] - len(verdict.failures)) > 0:
        say(f"  and {more:,} rows more")
    for line in settings["diagnosis"]:
        say(f"  {line}")


def as_json(verdicts: Mapping[str, AuditVerdict]) -> str:
    """Return verdicts by the name of their table."""
    return json.dumps({name: asdict(verdict) for name, verdict in verdicts.items()}, indent=1)


def _measures(measures: Mapping[str, Mapping[str, object]]) -> Table:
    table = Table("compared", "most apart", "allowed", "two live passes", "unit", box=SIMPLE)
    for found in measures.values():
        control = found["control"]
        assert isinstance(control, dict)
        live = ", ".join(f"{how} {value:.2g}" for how, value in control.items()) or "-"
        cells = found["of"], f"{found['most']:.2g}", f"{found['allowed']:.2g}", live, found["unit"]
        table.add_row(*(Text(str(cell)) for cell in cells))
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
