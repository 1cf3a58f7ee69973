"""Records out of any table that ``datasets`` reads, each with its place, one in memory at a time.

Integers of a column that carries names for them (``ClassLabel``) come as those names.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from schemas.errors import ConfigError
from stages.sources.reading.source import HubData, RowFiles
from stages.sources.reading.values import json_object, raw_lines, readable

Record = tuple[str, dict[str, Any]]  # its place (``file:line``), and its columns


def read_records(source: RowFiles | HubData) -> Iterator[Record]:
    """Yield the records in order; raises ConfigError for a file or a line that cannot be read."""
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


def _json_rows(path: Path) -> Iterator[Record]:
    number = 0
    for lines in raw_lines(path, "line"):
        for line in lines:
            number += 1
            if line.strip():
                record = json_object(line, path, number)
                if not isinstance(record, dict):
                    raise ConfigError(f"{path}:{number}: not UTF-8; save the file as UTF-8")
                yield f"{path}:{number}", record


def _columnar(kind: str, path: Path) -> Iterator[Record]:
    name = glob.escape(str(path))
    stream = datasets.load_dataset(kind, data_files=[name], split="train", streaming=True)
    yield from _streamed(stream, str(path))


def _streamed(stream: Any, where: str) -> Iterator[Record]:
    features = stream.features or {}
    labels = {name: kind for name, kind in features.items() if hasattr(kind, "int2str")}
    for number, record in enumerate(stream, 1):
        named = {
            name: kind.int2str(record[name])
            for name, kind in labels.items()
            if record[name] is not None
        }
        yield f"{where}:{number}", record | named
