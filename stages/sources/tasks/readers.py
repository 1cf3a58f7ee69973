"""Raw task files -> tasks whose examples are checked and distinct.

CrossFit's inputs may hold a literal `` [SEP] `` between two texts: it stays. A BIG-bench example
with several targets has the first for its answer, and one with ``target_scores`` the option whose
score is the only maximum.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from stages.sources.reading.lines import json_lines, json_object, text_lines, text_of, texts_of
from stages.sources.reading.records import read_records
from stages.sources.tasks.lama import read_lama
from stages.sources.tasks.sources import (
    CROSSFIT_NAME,
    BigBenchFiles,
    CrossFitFiles,
    LamaFiles,
    MetaIclFiles,
    TableRows,
    TaskSource,
)
from stages.sources.tasks.task import Example, Task, make_task


def read_tasks(sources: Sequence[TaskSource], counts: Counter[str]) -> list[Task]:
    """Return all tasks by name; ``counts`` takes what was left out, by reason.

    Raises ConfigError for a bad row, or for two tasks of one name.
    """
    tasks = [task for source in sources for task in _tasks_of(source, counts)]
    if not tasks:
        raise ConfigError("sources: their files hold no example")
    names = Counter(task.name for task in tasks)
    again = [name for name, count in names.items() if count > 1]
    if again:
        raise ConfigError(
            f"task '{again[0]}' comes from {names[again[0]]} sources; rename one, or leave one out"
        )
    return sorted(tasks, key=lambda task: task.name)


def _tasks_of(source: TaskSource, counts: Counter[str]) -> list[Task]:
    match source:
        case CrossFitFiles():
            return _read_crossfit(source, counts)
        case MetaIclFiles():
            return _read_metaicl(source, counts)
        case BigBenchFiles():
            return [_read_bigbench(path, counts) for path in source.files()]
        case LamaFiles():
            return read_lama(source, counts)
        case TableRows():
            return [read_table(source, counts)]


def _read_crossfit(source: CrossFitFiles, counts: Counter[str]) -> list[Task]:
    examples: dict[str, list[Example]] = {}
    for path in source.files():
        name = CROSSFIT_NAME.fullmatch(path.name)
        assert name is not None, "the source has checked it"
        examples.setdefault(name["task"], []).extend(_crossfit_rows(path))
    return [
        make_task(name, source.task_kind, rows, counts=counts) for name, rows in examples.items()
    ]


def _crossfit_rows(path: Path) -> list[Example]:
    rows = []
    for place, line in text_lines(path):
        columns = line.split("\t")
        if len(columns) != 2:
            raise ConfigError(
                f"{place}: got {len(columns)} columns, expected 2: input, a tab, output"
            )
        rows.append(Example((columns[0],), columns[1], (), place))
    return rows


def _read_metaicl(source: MetaIclFiles, counts: Counter[str]) -> list[Task]:
    examples: dict[str, list[Example]] = {}
    for path in source.files():
        for place, record in json_lines(path):
            task, text, output = (text_of(record, n, place) for n in ("task", "input", "output"))
            row = Example((text,), output, texts_of(record, "options", place), place)
            examples.setdefault(task, []).append(row)
    return [
        make_task(name, _metaicl_kind(rows), rows, counts=counts) for name, rows in examples.items()
    ]


def _metaicl_kind(rows: Sequence[Example]) -> str:
    spaces = {tuple(sorted(row.options)) for row in rows}
    if spaces == {()}:
        return "generation"
    return "classification" if len(spaces) == 1 else "multiple_choice"


def _read_bigbench(path: Path, counts: Counter[str]) -> Task:
    body = json_object("\n".join(line for _, line in text_lines(path)), str(path))
    name, records = text_of(body, "name", str(path)), body.get("examples")
    if not isinstance(records, list) or not records:
        raise ConfigError(f"{path}: no 'examples'; expected a BIG-bench task with a list of them")
    rows = [
        _bigbench_row(record, f"{path}: example {number}")
        for number, record in enumerate(records, 1)
    ]
    kind = "multiple_choice" if any(row.options for row in rows) else "generation"
    return make_task(name, kind, rows, counts=counts, heldout_only=True)


def _bigbench_row(record: Any, place: str) -> Example:
    if not isinstance(record, dict):
        raise ConfigError(f"{place}: got a {type(record).__name__}, expected an object")
    text = text_of(record, "input", place)
    scores = record.get("target_scores")
    if scores is not None:
        return Example((text,), _best(scores, place), tuple(scores), place)
    target = record.get("target")
    first = target[0] if isinstance(target, list) and target else target
    if not isinstance(first, str):
        raise ConfigError(f"{place}: expected 'target' (a text or a list) or 'target_scores'")
    return Example((text,), first, (), place)


def _best(scores: Any, place: str) -> str:
    if not isinstance(scores, dict) or not all(isinstance(s, int | float) for s in scores.values()):
        raise ConfigError(f"{place}: 'target_scores' has to give each option a number")
    best = [option for option, score in scores.items() if score == max(scores.values())]
    if len(best) != 1:
        raise ConfigError(
            f"{place}: {len(best)} options share the highest of 'target_scores', expected one"
        )
    return str(best[0])


def read_table(source: TableRows, counts: Counter[str]) -> Task:
    """Return the task; raises ConfigError for a missing column or a value that will not do."""
    rows = [_example(source, place, record) for place, record in read_records(source.source)]
    if not rows:
        raise ConfigError(f"task '{source.name}': its source holds no row")
    fixed = source.options if isinstance(source.options, tuple) else ()
    return make_task(source.name, source.task_kind, rows, counts=counts, options=fixed)


def _example(source: TableRows, place: str, record: dict[str, Any]) -> Example:
    text = "\n".join(text_of(record, column, place) for column in source.input_columns)
    options = texts_of(record, source.options, place) if isinstance(source.options, str) else ()
    return Example((text,), _output(source, place, record), options, place)


def _output(source: TableRows, place: str, record: dict[str, Any]) -> str:
    value = record.get(source.output)
    if source.label_names is None or not isinstance(value, int):
        return text_of(record, source.output, place)
    if value not in source.label_names:
        raise ConfigError(
            f"{place}: label {value} has no name in label_names; it names "
            f"{sorted(source.label_names)}"
        )
    return source.label_names[value]
