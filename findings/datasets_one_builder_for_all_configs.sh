#!/usr/bin/env bash
# datasets 5.2.0: where a card's configurations are of two file formats, all of them are read as the format of one.
#
# A data set card (README.md) may name several configurations, each with data files of its own. The format is looked at once, for the first
# configuration, and its builder reads every other one as well: JSON lines are opened as Parquet, or Parquet as JSON. Each of the two
# loads where it stands first.
#
# Seen: load_dataset(folder, "lines") raises ArrowInvalid, "Parquet magic bytes not found in footer", and loads with the two lines of the card
# in the other order; then it is load_dataset(folder, "columns") that fails, with a JSON parse error.
# Expected: both configurations load, in either order.
# Fails when both load.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "datasets==5.2.0"

cat >"$folder/cards.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datasets import load_dataset

print("datasets", version("datasets"), "pyarrow", pyarrow.__version__)
FILES = {"columns": "columns.parquet", "lines": "lines.jsonl"}


def loads(place: Path, order: list[str]) -> dict[str, str]:
    place.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), place / FILES["columns"])
    (place / FILES["lines"]).write_text('{"b": 3}\n')
    entries = "".join(f"- config_name: {name}\n  data_files: {FILES[name]}\n" for name in order)
    (place / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    found = {}
    for name in FILES:
        try:
            rows = load_dataset(str(place), name, split="train", cache_dir=str(place / "cache"))
            found[name] = f"{len(rows)} rows"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error.__cause__ or error}"
    return found


wrong = []
for first, second in (("columns", "lines"), ("lines", "columns")):
    found = loads(Path(sys.argv[1]) / first, [first, second])
    print(f"{first} first: {found}")
    wrong += [name for name, said in found.items() if not said.endswith("rows")]
sys.exit(0 if wrong == ["lines", "columns"] else f"{wrong} fail, seen before lines and then columns: datasets has changed")
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/cards.py" "$folder" 2>/dev/null
