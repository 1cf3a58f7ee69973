"""What every benchmark ends with: a table, its bars, a JSON file and an exit code.

``{"bars": [{"name", "value", "target", "ok"}], "rows": [...]}``: a bar is a number that the
product promises, a row is anything measured (its keys are the table's columns).
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Bar = dict[str, Any]


def at_most(name: str, value: float, target: float) -> Bar:
    """A bar that holds while ``value <= target``; a value that is not a number fails."""
    return {"name": name, "value": value, "target": f"<= {target:g}", "ok": bool(value <= target)}


def at_least(name: str, value: float, target: float) -> Bar:
    """A bar that holds while ``value >= target``; a value that is not a number fails."""
    return {"name": name, "value": value, "target": f">= {target:g}", "ok": bool(value >= target)}


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with what all benchmarks take: ``--quick``, ``--json`` and ``--cache``."""
    default = os.environ.get("TEACHERCACHE_CACHE", "~/.cache/teachercache")
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, on less data")
    parser.add_argument("--json", type=Path, help="write bars and rows to this file")
    parser.add_argument("--cache", type=_folder, default=default, help=f"default: {default}")
    return parser


def written_by(script: str, *, quick: bool) -> str:
    """Return a page's first sentence: its command, and of a quick run that it decides nothing."""
    if quick:
        return f"**Written by `python {script} --quick`, on little data: this decides nothing.**"
    return f"Written by `python {script} --docs docs/methods`."


def finish(
    bars: Sequence[Bar],
    rows: Sequence[Row],
    json_path: Path | None,
    *,
    shown: Sequence[Row] | None = None,
) -> int:
    """Print rows and bars, write them to ``json_path``; return 1 if a bar failed, else 0.

    ``shown`` is what to print where that is not all of ``rows``.
    """
    print(text_table(rows if shown is None else shown))
    print()
    for bar in bars:
        verdict = "ok  " if bar["ok"] else "FAIL"
        print(f"{verdict} {bar['name']}: {_text(bar['value'])} (bar {bar['target']})")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        body = {"bars": list(bars), "rows": [dict(row) for row in rows]}
        json_path.write_text(json.dumps(body, indent=1) + "\n")
    return 0 if all(bar["ok"] for bar in bars) else 1


def text_table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned text; a column that a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(names))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the rows as a markdown table, numbers with at most four significant digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[_text(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bars_table(bars: Sequence[Bar]) -> str:
    """Return the bars as a markdown table, which says of each whether it holds."""
    return markdown_table([bar | {"ok": "yes" if bar["ok"] else "**no**"} for bar in bars])


def machine() -> str:
    """Return the processors of this machine, for a page's head."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{sum(line.startswith('processor') for line in lines)} x {next(models, '?')}"


def _folder(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
