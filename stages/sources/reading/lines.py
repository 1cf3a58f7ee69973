"""Lines of a small UTF-8 file, each with its place: what is wrong with one is said with its line.

Task files are small (CrossFit's hold tens of rows) and many, so they are read whole, and without
``datasets``, which takes longer to open a file than to read one of these.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ``file:line`` and the line without its end; a line break ends the last one.

    Raises ConfigError for a file that cannot be read, is empty, or is not UTF-8.
    """
    try:
        body = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    lines = body.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise ConfigError(f"{path} is empty, expected one example a line")
    for number, line in enumerate(lines, 1):
        try:
            yield f"{path}:{number}", line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}:{number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
            ) from error


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``file:line`` and the object of each line that is not blank."""
    for place, line in text_lines(path):
        if line.strip():
            yield place, json_object(line, place)


def json_object(text: str, place: str) -> dict[str, Any]:
    """Return the JSON object that ``text`` is; raises ConfigError where it is not one."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{place}: not valid JSON ({error.msg} at character {error.pos + 1})"
        ) from error
    if not isinstance(body, dict):
        raise ConfigError(f"{place}: got a JSON {type(body).__name__}, expected an object")
    return body


def text_of(record: dict[str, Any], name: str, place: str) -> str:
    """Return a field that has to be a text; raises ConfigError where it is missing or is not."""
    value = record.get(name)
    if not isinstance(value, str):
        got = f"a {type(value).__name__}" if name in record else f"only {', '.join(record)}"
        raise ConfigError(f"{place}: expected a text '{name}', got {got}")
    return value


def texts_of(record: dict[str, Any], name: str, place: str) -> tuple[str, ...]:
    """Return a field that has to be a list of texts; empty where it is missing or null."""
    value = record.get(name) or ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{place}: '{name}' is {str(value)[:60]!r}, expected a list of texts")
    return tuple(value)
