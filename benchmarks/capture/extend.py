"""Does a tenth of new rows cost a tenth of the teacher's time? A full run against ``extend``.

Real text, SmolLM2-135M in float32 on CPU threads. A table is made of the first nine tenths of the
documents; then, in turns of one process, one of all of them by a run of its own and by an
extension of the first. The new documents are spread over the input, so that every shard has some.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from benchmarks.bars import (
    Bar,
    Row,
    at_most,
    bars_table,
    benchmark_parser,
    finish,
    machine,
    markdown_table,
)
from benchmarks.storage.real_positions import missing_asset
from pipeline.planning.plan import PlannedStep, make_plan
from pipeline.planning.recipe_file import load_recipe
from pipeline.state.step_state import Progress
from pipeline.steps.run import run_plan
from schemas.open_table import open_table
from schemas.storage.manifest import read_manifest
from schemas.storage.records import ShardRecord
from stages.stage import TableStage

LENGTH, ROWS_PER_SHARD, ONE_IN = 256, 20, 10
FULL, QUICK = 200, 40  # documents
MOST = 0.15  # of a full run's time, for a tenth of new rows

TEXT = """# A tenth of new rows

Regenerate with `python benchmarks/capture/extend.py --docs docs/measured/` (the figures below come
from that run). SmolLM2-135M-Instruct in float32 by transformers, {rows} documents of {length}
tokens in shards of {per_shard}, one in {one_in} of them new and in every shard. *Full* makes the
table of all rows, *extend* copies what the table of the others has. Wall and processor seconds of
the signal step; *start* is what it took until the engine was ready, *work* is the rest. The
machine: {machine}.

{table}

## Bars

{bars}

What is copied is decoded, encoded and compressed again, and hashed; where an engine is fast, that
is what an extension costs beside its new rows. Copied rows were the earlier table's, array by
array, in this run too.
"""


@dataclass
class Quiet:
    """A reporter that says nothing."""

    lines: list[str] = field(default_factory=list)

    def step_started(self, step: PlannedStep, progress: Progress) -> None: ...
    def said(self, line: str) -> None: ...
    def extending(self, line: str) -> None:
        self.lines.append(line)

    def engine_starting(self, what: str) -> None: ...
    def shards_expected(self, num_shards: int, num_finished: int) -> None: ...
    def shard_finished(self, record: ShardRecord) -> None: ...
    def warned(self, line: str) -> None:
        print(line)

    def trained(self, values: dict[str, Any]) -> None: ...
    def step_finished(self, step: PlannedStep) -> None: ...


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write extend.md there")
    options = parser.parse_args(arguments)
    if missing := missing_asset(options.cache):
        print(missing)
        return 2
    num_rows = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="extend-") as folder:
        rows = measure(Path(folder), options.cache, num_rows)
    bars = judge(rows)
    if options.docs:
        page = TEXT.format(
            rows=num_rows,
            length=LENGTH,
            per_shard=ROWS_PER_SHARD,
            one_in=ONE_IN,
            machine=machine(),
            table=markdown_table(rows),
            bars=bars_table(bars),
        )
        (options.docs / "extend.md").write_text(page, encoding="utf-8")
    return finish(bars, rows, options.json)


def documents(cache: Path, count: int) -> list[str]:
    """Return so many different texts, each long enough to fill a row."""
    text = (cache / "text" / "wiki_demo.txt").read_text(encoding="utf-8")
    size = LENGTH * 8  # characters: over four a token, of any text
    return [text[at : at + size] for at in range(0, count * size, size)]


def measure(folder: Path, cache: Path, num_rows: int) -> list[dict[str, Any]]:
    """Make the earlier table, then the later one both ways."""
    texts = documents(cache, num_rows)
    known = [text for at, text in enumerate(texts) if at % ONE_IN]
    earlier = _recipe(folder, "extended", cache, known)
    timed(earlier, extends=False)
    rows = []
    for way, root in (("full", "alone"), ("extend", "extended")):
        path = _recipe(folder, root, cache, texts)
        step, taken = timed(path, extends=way == "extend")
        num_new = sum(shard.num_rows for shard in read_manifest(step.place).shards)
        rows.append({"way": way, "rows": num_new, **taken})
    _require_copied(earlier, path)
    return rows


def _recipe(folder: Path, root: str, cache: Path, texts: Sequence[str]) -> Path:
    source = folder / f"{root}-{len(texts)}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    body = {
        "name": "extend",
        "models": {
            "teacher": {
                "path": str(cache / "models" / "smollm2-135m-instruct"),
                "dtype": "float32",
                "engine": "transformers",
            }
        },
        "steps": {
            "documents": {
                "stage": "ingest",
                "source": {"kind": "jsonl", "paths": [str(source)]},
                "tokenizer": "teacher",
                "length": LENGTH,
                "mode": "truncate",
                "heldout_fraction": 0.0,
                "rows_per_shard": ROWS_PER_SHARD,
            },
            "signals": {"stage": "teacher_logits", "input": "documents", "model": "teacher"},
        },
        "execution": {"root": str(folder / root), "engine": {"device": "cpu"}},
    }
    path = folder / f"{root}-{len(texts)}.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def timed(path: Path, *, extends: bool) -> tuple[PlannedStep, dict[str, float]]:
    """Run a recipe; return its signal step and the seconds that it took."""
    recipe = load_recipe(path, [])
    source, signals = make_plan(recipe)
    run_plan([source], recipe.execution, Quiet())
    starts: list[tuple[float, float]] = []
    open_stage = TableStage.open

    @contextmanager
    def noted(self: TableStage, context: Any) -> Iterator[Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        with open_stage(self, context) as work:
            starts.append((time.perf_counter() - wall, time.process_time() - cpu))
            yield work

    roots = [recipe.execution.root] if extends else []
    wall, cpu = time.perf_counter(), time.process_time()
    with patch.object(TableStage, "open", noted):
        run_plan([signals], recipe.execution, Quiet(), extends=roots)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    start_wall, start_cpu = map(sum, zip(*starts, strict=True))
    return signals, {
        "wall s": wall,
        "start, wall s": start_wall,
        "work, wall s": wall - start_wall,
        "processor s": cpu,
        "start, processor s": start_cpu,
        "work, processor s": cpu - start_cpu,
    }


def _require_copied(earlier: Path, later: Path) -> None:
    """See that the extended table has the earlier one's rows as they were."""
    tables = []
    for path in (earlier, later):
        place = make_plan(load_recipe(path, []))[1].place
        table = open_table(place, split=None, verify=True)
        tables.append({row["sample_id"]: row for row in map(table.row, range(table.num_rows))})
    for key, row in tables[0].items():
        for name, value in row.items():
            same = tables[1][key][name]
            assert value == same if isinstance(value, str | int) else (value == same).all(), name


def judge(rows: Sequence[Row]) -> list[Bar]:
    full, extended = rows
    return [
        at_most(f"extend / full, {what}", extended[what] / full[what], MOST)
        for what in ("work, wall s", "work, processor s")
    ]


if __name__ == "__main__":
    sys.exit(main())
