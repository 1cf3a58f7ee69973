"""One task out of any table that ``datasets`` reads: columns of the recipe's choice.

Labels kept as integers get the names that the recipe gives them, or else those that the table
itself carries (a ``ClassLabel`` column).
"""

from collections import Counter
from typing import Any

from schemas.errors import ConfigError
from stages.ingest.records import read_records
from stages.ingest.task_lines import text_of, texts_of
from stages.ingest.task_sources import TableRows
from stages.ingest.tasks import Example, Task, make_task


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
