"""Records out of any table that ``datasets`` reads, each with its place, few in memory at a time.

Integers of a column that carries names for them (``ClassLabel``) come as those names; one that has
none (-1 stands for "no label" in published test sets) stays what it is.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from stages.sources.reading.hub_rows import hub_name, hub_rows
from stages.sources.reading.lines import json_object
from stages.sources.reading.rejects import MalformedRecord, Rejects
from stages.sources.reading.source import HubData, RowFiles
from stages.sources.reading.values import ROWS_PER_READ, raw_objects, readable

Record = tuple[
    str, dict[str, Any]
]  # its place (``file:line``; in an array its number), and its columns


def read_records(source: RowFiles | HubData, rejects: Rejects) -> Iterator[Record]:
    """Yield the records in order and count them, with those that cannot be read among the rejects.

    Raises ConfigError for a file that cannot be read.
    """
    if isinstance(source, HubData):
        where = hub_name(source)
        with readable(where, "hub"), hub_rows(source) as stream:
            yield from _streamed(stream, where, rejects)
        return
    for path in source.files():
        with readable(str(path), source.kind):
            if source.is_json:
                yield from _json_rows(source.kind, path, rejects)
            else:
                yield from _columnar(source.kind, path, rejects)


def _json_rows(kind: str, path: Path, rejects: Rejects) -> Iterator[Record]:
    number = 0
    for lines in raw_objects(kind, path):
        for line in lines:
            number += 1
            if not line.strip():
                continue
            rejects.num_read += 1
            try:
                record = json_object(line)
            except MalformedRecord as error:
                rejects.add(f"{path}:{number}", error)
            else:
                yield f"{path}:{number}", record


def _columnar(kind: str, path: Path, rejects: Rejects) -> Iterator[Record]:
    name = glob.escape(str(path))
    stream = datasets.load_dataset(kind, data_files=[name], split="train", streaming=True)
    yield from _streamed(stream, str(path), rejects)


def _streamed(stream: Any, where: str, rejects: Rejects) -> Iterator[Record]:
    features = stream.features or {}
    labels = {name: kind for name, kind in features.items() if hasattr(kind, "int2str")}
    number = 0
    for table in stream.with_format("arrow").iter(batch_size=ROWS_PER_READ):
        for row in range(table.num_rows):
            number += 1
            rejects.num_read += 1
            try:
                record = _record(table, row)
            except UnicodeDecodeError:  # Arrow does not promise that a string column is valid
                detail = "a text is not UTF-8; save the file as UTF-8"
                rejects.add(f"{where}:{number}", MalformedRecord("invalid_unicode", detail))
            else:
                yield f"{where}:{number}", record | _named(record, labels)


def _record(table: Any, row: int) -> dict[str, Any]:
    columns = zip(table.column_names, table.columns, strict=True)
    return {name: column[row].as_py() for name, column in columns}


def _named(record: dict[str, Any], labels: dict[str, Any]) -> dict[str, str]:
    """Return the names of the labels that have one."""
    return {
        name: kind.names[record[name]]
        for name, kind in labels.items()
        if isinstance(record[name], int) and 0 <= record[name] < len(kind.names)
    }
