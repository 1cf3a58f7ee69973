"""Lines and fields of records, and in one line each what is wrong with one that is malformed.

Task files are small (CrossFit's hold tens of rows) and many, so they are read whole, and without
``datasets``, which takes longer to open a file than to read one of these.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from stages.sources.reading.rejects import MalformedRecord, Rejects, UnusableRecord

_SHOWN, _COLUMNS_SHOWN = 60, 400  # characters of a value, and of columns, that a message repeats


def text_lines(path: Path, rejects: Rejects) -> Iterator[tuple[str, str]]:
    """Yield ``file:line`` and each line that is not blank, without its end; count those read.

    A line that is not UTF-8 is rejected. Raises ConfigError for a file that cannot be read.
    """
    for place, line in _lines(path, rejects):
        try:
            text = decoded(line)
        except UnusableRecord as error:
            rejects.add(place, error)
        else:
            yield place, text


def json_lines(path: Path, rejects: Rejects) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``file:line`` and the object of each line that is not blank; count those read."""
    for place, line in _lines(path, rejects):
        try:
            record = json_object(line)
        except UnusableRecord as error:
            rejects.add(place, error)
        else:
            yield place, record


def _lines(path: Path, rejects: Rejects) -> Iterator[tuple[str, bytes]]:
    body = bytes_of(path)
    for number, line in enumerate(body.split(b"\n"), 1):
        if line.strip():
            rejects.num_read += 1
            yield f"{path}:{number}", line.removesuffix(b"\r")


def bytes_of(path: Path) -> bytes:
    """Return what a file holds after its byte order mark; raises ConfigError where it cannot."""
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def decoded(line: bytes) -> str:
    """Return a line's text; raises MalformedRecord where it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise MalformedRecord(
            "invalid_unicode", f"byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from error


def json_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object that a line is; raises MalformedRecord where it is not one."""
    try:
        body = json.loads(decoded(line))
    except json.JSONDecodeError as error:
        raise MalformedRecord(
            "broken_json",
            f"not valid JSON ({error.msg} at character {error.pos + 1}), expected one whole object",
        ) from error
    except (ValueError, RecursionError) as error:  # what the format allows and Python does not
        raise MalformedRecord(
            "broken_json", "not valid JSON (a number is too long, or it is nested too deep)"
        ) from error
    if not isinstance(body, dict):
        raise MalformedRecord(
            "not_an_object",
            f'got a JSON {type(body).__name__}, expected an object {{"...": "..."}}',
        )
    return body


def read_by(columns: Iterable[str], wanted: str) -> str:
    """Return which stage reads records with such columns, where text was looked for in them."""
    there = set(columns)
    if wanted != "text":
        return ""
    if {"chosen", "rejected"} <= there:
        return "; preference pairs are read by stage preference_pairs"
    chats = ({"messages"}, {"conversations"}, {"instruction", "output"}, {"prompt", "completion"})
    return "; chats are read by stage conversations" if any(c <= there for c in chats) else ""


def field_of(record: dict[str, Any], name: str, expected: str) -> Any:
    """Return a field; raises MalformedRecord where it is missing or null."""
    if name not in record:
        columns = ", ".join(map(repr, record))[:_COLUMNS_SHOWN] or "none"
        raise MalformedRecord(
            "missing_column", f"no column '{name}'; it has {columns}{read_by(record, name)}"
        )
    if record[name] is None:
        raise MalformedRecord("missing_text", f"'{name}' is null, expected {expected}")
    return record[name]


def text_of(record: dict[str, Any], name: str) -> str:
    """Return a field that has to be a text; raises MalformedRecord where it is not."""
    value = field_of(record, name, "a text")
    if not isinstance(value, str):
        raise MalformedRecord("not_a_string", f"'{name}' is {shown(value)}, expected a text")
    return valid(value, name)


def texts_of(record: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return a field that has to be a list of texts; empty where it is missing or null."""
    value = record.get(name)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise MalformedRecord(
            "not_a_list_of_texts", f"'{name}' is {shown(value)}, expected a list of texts"
        )
    return tuple(valid(item, name) for item in value)


def valid(text: str, name: str) -> str:
    """Return a text; raises MalformedRecord for a lone surrogate: JSON can spell it, UTF-8 not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MalformedRecord("invalid_unicode", f"'{name}' is not valid Unicode") from error
    return text


def shown(value: object) -> str:
    """Return what a value is, as far as one line has room for it; ASCII where it is no text."""
    spelled = ascii(value)
    return f"a {type(value).__name__}: {spelled[:_SHOWN]}{'...' if len(spelled) > _SHOWN else ''}"
