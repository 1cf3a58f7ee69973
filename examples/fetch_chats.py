"""Turn the chats that ``fetch_assets.py`` fetched into the form that ``conversations`` reads.

    python examples/fetch_chats.py [--cache DIR]

makes, out of DIR/text/alpaca_en_demo.json and DIR/text/dpo_en_demo.json (default DIR:
$TEACHERCACHE_CACHE, or ~/.cache/teachercache):

    chats/chats.jsonl    1,299 chats, one object with ``messages`` a line

999 are an instruction and its answer, 300 have system turns or several turns and end with the
answer that was preferred. Nothing is fetched and no text is changed. What is there already is not
made again, and the file takes its name only when it is whole.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.fetch_assets import FetchError
from examples.fetch_pairs import PARTS, read_array, write_lines

INSTRUCTIONS = Path("text/alpaca_en_demo.json")
PREFERRED = Path("text/dpo_en_demo.json")
CHATS = Path("chats/chats.jsonl")
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def main(arguments: Sequence[str] | None = None) -> int:
    default = os.environ.get("TEACHERCACHE_CACHE", "~/.cache/teachercache")
    parser = argparse.ArgumentParser(description="Make the chats that the examples use.")
    parser.add_argument("--cache", type=Path, default=Path(default), help=f"default: {default}")
    cache: Path = parser.parse_args(arguments).cache.expanduser().absolute()
    try:
        make_chats(cache)
    except (FetchError, OSError) as error:
        print(f"fetch_chats: {error}", file=sys.stderr)
        return 1
    return 0


def make_chats(cache: Path) -> None:
    target = cache / CHATS
    if target.is_file():
        print(f"chats: ready in {target}")
        return
    instructions = read_array(cache / INSTRUCTIONS, {"instruction", "input", "output"})
    preferred = read_array(cache / PREFERRED, PARTS)
    chats = [of_instruction(record) for record in instructions] + [
        of_turns([*record["conversations"], record["chosen"]]) for record in preferred
    ]
    write_lines(cache, target, [{"messages": messages} for messages in chats])
    print(f"chats: {len(chats)} -> {target}")


def of_instruction(record: Mapping[str, str]) -> list[dict[str, str]]:
    asked = "\n".join(filter(None, (record["instruction"], record["input"])))
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": record["output"]},
    ]


def of_turns(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


if __name__ == "__main__":
    sys.exit(main())
