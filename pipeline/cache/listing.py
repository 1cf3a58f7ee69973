"""``teachercache ls``: a root's tables, checkpoints and reports, for people and as JSON."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from pipeline.cache.entries import Entry, Origins, entries_of
from pipeline.planning.fingerprint import ADDRESS_DIGITS
from pipeline.planning.plan import PlannedStep
from pipeline.state.audit_state import NONE
from schemas.storage.files import Folder

COLUMNS = (
    *("table", "address", "what", "state", "rows", "tokens", "bytes"),
    *("made of", "made by"),
)
WIDTHS = dict.fromkeys(("address", "made of"), ADDRESS_DIGITS)


@dataclass(frozen=True, slots=True)
class _Line:
    """An entry, what it is made of, and whose it is: a recipe's step, or what its record says."""

    entry: Entry
    made_of: tuple[str, ...]
    made_by: str


def print_listing(
    console: Console, root: Folder, steps: Sequence[PlannedStep], *, as_json: bool
) -> None:
    """Show what lies in ``root``; what one of ``steps`` makes is called by its name."""
    entries = entries_of(root)
    names = step_names(steps)
    origins = Origins(entries)
    lines = [
        _Line(
            entry,
            tuple(other.name for other in origins.of(entry)),
            names.get(entry.folder, entry.made_by),
        )
        for entry in entries
    ]
    if as_json:
        print(json.dumps([_as_dict(line) for line in lines]))  # noqa: T201
        return
    table = Table(*(Column(name, min_width=WIDTHS.get(name)) for name in COLUMNS), box=SIMPLE)
    for line in lines:
        table.add_row(*_cells(line))
    console.print(table)
    for line in lines:
        if line.entry.why and line.entry.state == "damaged":
            _say(console, f"{line.entry.name}: damaged: {line.entry.why}")
        if temporary := line.entry.files.temporary:
            size = decimal(sum(temporary.values()))
            _say(console, f"{line.entry.name}: {len(temporary)} temporary files, {size}")
    _say(console, f"{root}: {_total(entries)}")


def step_names(steps: Sequence[PlannedStep]) -> Mapping[Folder, str]:
    """Return ``recipe/step`` for each folder that a recipe's steps are in."""
    names: dict[Folder, str] = {}
    for step in steps:
        name = f"{step.recipe}/{step.name}"
        names[step.place] = f"{names[step.place]}, {name}" if step.place in names else name
    return names


def _cells(line: _Line) -> list[Text]:
    """Addresses are never cut; what the data say stands there as it is, without markup."""
    entry = line.entry
    cells = (
        entry.folder.parent.name,
        entry.folder.name,
        entry.what or "-",
        entry.state if entry.audit == NONE else f"{entry.state}, {entry.audit}",
        _count(entry.num_rows),
        _count(entry.num_tokens),
        decimal(entry.files.num_bytes),
        "\n".join(name.split("/")[1] for name in line.made_of) or "-",
        line.made_by or "-",
    )
    return [Text(cell, overflow="fold") for cell in cells]


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _total(entries: Sequence[Entry]) -> str:
    states = Counter(entry.state for entry in entries)
    counts = ", ".join(f"{states[state]} {state}" for state in sorted(states))
    return f"{counts}; {decimal(sum(entry.files.num_bytes for entry in entries))}"


def _as_dict(line: _Line) -> dict[str, object]:
    entry = line.entry
    return {
        "folder": str(entry.folder),
        "group": entry.folder.parent.name,
        "what": entry.what,
        "state": entry.state,
        "why": entry.why,
        "audit": entry.audit,
        "fingerprint": entry.fingerprint,
        "rows": entry.num_rows,
        "tokens": entry.num_tokens,
        "positions": entry.num_positions,
        "bytes": entry.files.num_bytes,
        "temporary": sorted(entry.files.temporary),
        "made_of": list(line.made_of),
        "made_by": line.made_by,
    }


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
