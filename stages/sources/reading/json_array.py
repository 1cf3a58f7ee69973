"""The records of a file that is one JSON array, as they are spelt, few in memory at a time.

The array is cut at the commas between its elements by brackets and quotes alone; whether an element
is JSON is for its reader to say, so that a bad one costs itself. One that has no end within 64 MiB
ends the reading: what stands open there (a quote, a bracket) would take the rest of the file in.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError

_READ = 1 << 20
_LONGEST = 64 << 20
_MARKS = re.compile(rb'["\[\]{},]')
_MARKS_IN_TEXT = re.compile(rb'["\\]')
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def array_elements(stream: Any, path: Path) -> Iterator[bytes]:
    """Yield the bytes of each element, blanks around it stripped; raises ConfigError, in one line.

    ``stream`` is read as bytes. An empty array has one blank element, as has a comma at its end.
    """
    _open_array(stream, path)
    number, depth = 1, 1
    in_text = is_escaped = False
    kept = bytearray()  # what is read of an element
    while chunk := stream.read(_READ):
        start = at = 0
        while depth:
            if is_escaped:
                if at == len(chunk):
                    break
                at, is_escaped = at + 1, False
            found = (_MARKS_IN_TEXT if in_text else _MARKS).search(chunk, at)
            if found is None:
                break
            at, mark = found.end(), found.group()
            if mark == b'"':
                in_text = not in_text
            elif mark == b"\\":
                is_escaped = True
            elif mark in b"[{":
                depth += 1
            elif mark in b"]}":
                depth -= 1
            if depth == 0 or (depth == 1 and mark == b"," and not in_text):
                yield bytes(kept + chunk[start : at - 1]).strip()
                kept.clear()
                start, number = at, number + 1
        kept += chunk[start:]
        if depth == 0 and kept.strip():
            raise ConfigError(
                f"{path}: there is more after the end of the array, at record {number}: expected "
                f"one JSON array of objects; check the brackets before it"
            )
        if len(kept) > _LONGEST:
            raise ConfigError(
                f"{path}: record {number} does not end within {_LONGEST >> 20} MiB: check its "
                f"quotes and brackets"
            )
    if depth:
        raise ConfigError(
            f"{path}: ends inside record {number}: the file is cut, or a quote or a bracket of "
            f"that record is not closed"
        )


def _open_array(stream: Any, path: Path) -> None:
    first = stream.read(1)
    if first == _BYTE_ORDER_MARK[:1]:
        first = stream.read(len(_BYTE_ORDER_MARK))[2:]
    while first in (b" ", b"\t", b"\r", b"\n"):
        first = stream.read(1)
    if first != b"[":
        got = f"begins with {first.decode('latin-1')!r}" if first else "is empty"
        raise ConfigError(
            f"{path}: {got}, expected one JSON array of objects; a file with an object on each "
            f"line is of kind jsonl"
        )
