"""What a reader of the bare shards has to know, in a file beside the manifest: ``schema.json``.

The same stands in the metadata of each shard's Arrow schema, which not every reader hands on. Equal
tables have equal files. A table is complete without it: the manifest does not name it, and tables
that were finished before there was one have none.
"""

import inspect
import json
from collections.abc import Mapping
from typing import Any

from ..table import BoundTable
from .files import Folder, write_text

SCHEMA_FILE = "schema.json"


def write_schema_file(
    folder: Folder, bound: BoundTable[Any], *, tokenizer: str, settings: Mapping[str, Any]
) -> None:
    """Write what the columns of a table are: types, dimensions, units and meaning.

    ``tokenizer`` is the fingerprint of the tokenizer whose ids the table holds, ``settings`` what
    its step was told (an encoding, say), as it is hashed.
    """
    table = bound.table
    columns = [
        {"name": name, "type": str(bound.schema.field(name).type)}
        | {"dims": column.dims, "unit": column.unit, "doc": column.doc}
        for name, column in table.columns.items()
    ]
    body = {
        "table": table.name,
        "version": table.version,
        "variant": table.variant,
        "about": (inspect.getdoc(table.row) or "").partition("\n")[0],
        "vocab_size": bound.vocab_size,
        "tokenizer": tokenizer,
        "sizes": bound.sizes,
        "columns": columns,
        "settings": dict(settings),
    }
    write_text(folder / SCHEMA_FILE, json.dumps(body, indent=1) + "\n")
