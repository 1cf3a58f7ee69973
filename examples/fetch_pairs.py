"""Turn the preference pairs that ``fetch_assets.py`` fetched into the form that ingest reads.

    python examples/fetch_pairs.py [--cache DIR]

makes, out of DIR/text/dpo_en_demo.json (default DIR: $TEACHERCACHE_CACHE, or
~/.cache/teachercache):

    pairs/dpo_en_demo.jsonl    300 pairs, one ShareGPT object a line

Nothing is fetched and no text is changed. What is there already is not made again, and the file
takes its name only when it is whole.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from examples.fetch_assets import FetchError, scratch_folder

SOURCE = Path("text/dpo_en_demo.json")
PAIRS = Path("pairs/dpo_en_demo.jsonl")
PARTS = {"conversations", "chosen", "rejected"}


def main(arguments: Sequence[str] | None = None) -> int:
    default = os.environ.get("TEACHERCACHE_CACHE", "~/.cache/teachercache")
    parser = argparse.ArgumentParser(description="Make the preference pairs the examples use.")
    parser.add_argument("--cache", type=Path, default=Path(default), help=f"default: {default}")
    cache: Path = parser.parse_args(arguments).cache.expanduser().absolute()
    try:
        make_pairs(cache)
    except (FetchError, OSError) as error:
        print(f"fetch_pairs: {error}", file=sys.stderr)
        return 1
    return 0


def make_pairs(cache: Path) -> None:
    target = cache / PAIRS
    if target.is_file():
        print(f"pairs: ready in {target}")
        return
    pairs = read_array(cache / SOURCE, PARTS)
    write_lines(cache, target, pairs)
    print(f"pairs: {len(pairs)} -> {target}")


def write_lines(cache: Path, target: Path, records: Sequence[dict[str, Any]]) -> None:
    with scratch_folder(cache) as scratch:
        with (scratch / target.name).open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            stream.flush()
            os.fsync(stream.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / target.name, target)


def read_array(path: Path, parts: Set[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FetchError(f"{path} is not there: run examples/fetch_assets.py first")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FetchError(f"{path} is not JSON ({error}): remove it and fetch it again") from error
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and record.keys() >= parts for record in records
    ):
        raise FetchError(f"{path} is no list of objects with {', '.join(sorted(parts))}")
    return records


if __name__ == "__main__":
    sys.exit(main())
