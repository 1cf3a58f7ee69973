"""A preference evaluation as a person reads it: one column a student, then who wins over whom.

In brackets stands the 95 % bootstrap interval over prompts. Works on the report's JSON, so that
what a recipe's step has written is shown like what has just been measured.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Header and name of a number; one that no column has is left out.
ROWS = (
    ("reward of its responses", "reward"),
    ("reward per token", "reward_per_token"),
    ("preference accuracy", "accuracy"),
    ("preference accuracy, per token", "accuracy_per_token"),
    ("margin, nats", "margin"),
    ("margin per token, nats", "margin_per_token"),
    ("preference accuracy against baseline", "relative_accuracy"),
    ("margin against baseline, nats", "relative_margin"),
    ("KL to baseline", "kl_to_baseline"),
    ("cross-entropy on chosen", "cross_entropy"),
    ("response tokens", "response_tokens"),
    ("finished", "finished"),
    ("empty", "empty"),
)
WON = "wins over baseline"
PROMPT_CHARACTERS = 400  # of an example, its end

Body = Mapping[str, Any]


def print_preference_report(console: Console, student: str, body: Body, *, as_json: bool) -> None:
    """Show one evaluation whole, with its examples."""
    if as_json:
        console.print_json(json.dumps({"student": student, **body}))
        return
    console.print(student, highlight=False, soft_wrap=True)
    for table in preference_tables(body, title="held-out pairs"):
        console.print(table)
    _print_notes(console, body)
    for example in body["examples"]:
        _print_example(console, example)


def preference_tables(body: Body, *, title: str) -> Iterator[Table]:
    """Yield the table of numbers and, with a judge and several students, that of win rates."""
    yield _numbers_table(body, title)
    if body["win_rates"]:
        yield _win_table(body)


def _numbers_table(body: Body, title: str) -> Table:
    columns = dict(body["students"]) | {f"({name})": found for name, found in body["data"].items()}
    if body["judge"]:
        columns["(judge)"] = body["judge"]
    baseline = body["baseline"]
    headers = [f"{name}, baseline" if name == baseline != "baseline" else name for name in columns]
    table = _empty(title, ["", *headers])
    for header, name in ROWS:
        if any(name in found for found in columns.values()):
            table.add_row(header, *(_cell(found.get(name)) for found in columns.values()))
    if any("win_rate" in found for found in columns.values()):
        table.add_row(WON, *map(_won, columns.values()))
    return table


def _win_table(body: Body) -> Table:
    """A row's share of prompts won from a column's student, ties counting one half."""
    names = list(body["students"])
    shares: dict[tuple[str, str], str] = {}
    for comparison in body["win_rates"]:
        first, second, found = comparison["first"], comparison["second"], comparison["result"]
        rate, low, high = found["rate"], found["low"], found["high"]
        shares[first, second] = _interval(rate, low, high)
        shares[second, first] = _interval(1 - rate, 1 - high, 1 - low)
    title = f"share of {body['num_prompts']} prompts won"
    table = _empty(title, ["", *(f"over {name}" for name in names)])
    for first in names:
        table.add_row(first, *(shares.get((first, second), "-") for second in names))
    return table


def _print_notes(console: Console, body: Body) -> None:
    judge = body["judge"]
    lines = [f"{body['num_prompts']} prompts, answered greedily"]
    if judge:
        source = "cached scores" if judge["cached"] else "the judge run live"
        lines.append(
            f"judge: beta {judge['beta']:g}; rewards of chosen and rejected are from {source}"
        )
    if body["num_missing"]:
        lines.append(f"{body['num_missing']} pairs left out: a table given has no score of them")
    if body["num_too_long"]:
        lines.append(f"{body['num_too_long']} pairs left out: they do not fit a model's window")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _print_example(console: Console, example: Body) -> None:
    prompt = example["prompt"]
    cut = prompt if len(prompt) <= PROMPT_CHARACTERS else "..." + prompt[-PROMPT_CHARACTERS:]
    said = [*example["students"].items()]
    said += [(f"({name})", response) for name, response in example["data"].items()]
    table = Table.grid(padding=(0, 1))
    table.add_row(Text("prompt", style="bold"), Text(cut))
    for name, response in said:
        reward = "" if response["reward"] is None else f", reward {response['reward']:.3f}"
        end = "" if response["finished"] else ", cut"
        about = f"[{response['num_tokens']} tokens{end}{reward}] "
        table.add_row(Text(name, style="bold"), Text(about + response["text"]))
    console.print()
    console.print(table)


def _won(found: Body) -> str:
    if "win_rate" not in found:
        return "-"
    return _interval(found["win_rate"], found["win_rate_low"], found["win_rate_high"])


def _interval(rate: float, low: float, high: float) -> str:
    return f"{rate:.3f} ({low:.2f} to {high:.2f})"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _empty(title: str, headers: list[str]) -> Table:
    """Return a table without frames: students' names need the room."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(header, overflow="fold", no_wrap=index == 0)
    return table
