"""One task out of any table that ``datasets`` reads: columns of the recipe's choice.

Labels kept as integers get the names that the recipe gives them, or else those that the table
itself carries (a ``ClassLabel`` column).
"""

import glob
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from schemas.errors import ConfigError

from .reading import json_object, raw_lines, readable
from .source import HubData, RowFiles
from .task_lines import text_of, texts_of
from .task_sources import TableRows
from .tasks import Example, Task, make_task

_Record = tuple[str, dict[str, Any]]  # its place, and its columns


def read_table(source: TableRows, counts: Counter[str]) -> Task:
    """Return the task; raises ConfigError for a missing column or a value that will not do."""
    rows = [_example(source, place, record) for place, record in _records(source.source)]
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


def _records(source: RowFiles | HubData) -> Iterator[_Record]:
    if isinstance(source, HubData):
        source.files()  # refuses a folder of that name
        where = f"hub data set '{source.name}' at {source.revision[:12]}"
        with readable(where, "hub"):
            stream = datasets.load_dataset(
                source.name,
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=True,
            )
            yield from _streamed(stream, where)
        return
    for path in source.files():
        with readable(str(path), source.kind):
            yield from _json_rows(path) if source.kind == "jsonl" else _columnar(source.kind, path)


def _json_rows(path: Path) -> Iterator[_Record]:
    number = 0
    for lines in raw_lines(path, "line"):
        for line in lines:
            number += 1
            if line.strip():
                record = json_object(line, path, number)
                if not isinstance(record, dict):
                    raise ConfigError(f"{path}:{number}: not UTF-8; save the file as UTF-8")
                yield f"{path}:{number}", record


def _columnar(kind: str, path: Path) -> Iterator[_Record]:
    name = glob.escape(str(path))
    stream = datasets.load_dataset(kind, data_files=[name], split="train", streaming=True)
    yield from _streamed(stream, str(path))


def _streamed(stream: Any, where: str) -> Iterator[_Record]:
    features = stream.features or {}
    labels = {name: kind for name, kind in features.items() if hasattr(kind, "int2str")}
    for number, record in enumerate(stream, 1):
        named = {
            name: kind.int2str(record[name])
            for name, kind in labels.items()
            if record[name] is not None
        }
        yield f"{where}:{number}", record | named
