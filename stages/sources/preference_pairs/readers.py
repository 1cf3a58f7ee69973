"""Records of the three formats -> pairs of dialogues, nothing of them judged yet.

Text is kept as it stands, but for HH-RLHF transcripts, whose spaces around a turn are punctuation.
What else a message holds (tool calls, thoughts) goes with it, and ``tools`` with the row.
"""

import re
from collections.abc import Iterator
from typing import Any

from schemas.errors import ConfigError
from stages.sources.dialogues.dialogue import ASSISTANT, SYSTEM, USER, Message, strings_of
from stages.sources.preference_pairs.pairs import Branch, RawPair
from stages.sources.preference_pairs.stage import HubPairs, PairColumns, PairFiles
from stages.sources.reading.lines import text_of
from stages.sources.reading.records import read_records

_STANDARD, _SHAREGPT = ("role", "content"), ("from", "value")
_SPEAKERS = {"human": USER, "gpt": ASSISTANT}
_TRANSCRIPT_SPEAKERS = {"Human": USER, "Assistant": ASSISTANT}
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_Record = dict[str, Any]


def read_pairs(source: PairFiles | HubPairs) -> Iterator[RawPair]:
    """Yield the pairs in order; raises ConfigError for a record that lacks or misspells a part."""
    branch_of = {"standard": _standard, "hh_rlhf": _transcript, "sharegpt": _sharegpt}
    read = branch_of[source.format]
    for place, row in read_records(source):
        record = row if source.kind == "jsonl" else _without_nulls(row)
        chosen, rejected = (
            read(source, record, column, place) for column in (source.chosen, source.rejected)
        )
        yield RawPair(place, chosen, rejected, record.get("tools"))


def _standard(source: PairColumns, record: _Record, column: str, place: str) -> Branch:
    said = _said(record, column, place, ASSISTANT)
    is_whole = said[0].role in (SYSTEM, USER)
    before = () if is_whole else _said(record, source.prompt, place, USER)
    return Branch((*before, *said[:-1]), said[-1])


def _transcript(source: PairColumns, record: _Record, column: str, place: str) -> Branch:
    text = _valid(text_of(record, column, place), column, place)
    before, *pieces = _TURN.split(text.strip())
    if before or not pieces:
        raise ConfigError(
            f"{place}: '{column}' is {text[:40]!r}, expected a transcript that begins with "
            f"'Human:' and parts turns by empty lines; or choose another format"
        )
    said = tuple(
        Message(_TRANSCRIPT_SPEAKERS[speaker], words.strip())
        for speaker, words in zip(pieces[::2], pieces[1::2], strict=True)
    )
    return Branch(said[:-1], said[-1])


def _sharegpt(source: PairColumns, record: _Record, column: str, place: str) -> Branch:
    said = _messages(record.get("conversations"), "conversations", place, _SHAREGPT)
    response = _message(record.get(column), column, place, _SHAREGPT)
    system = text_of(record, "system", place) if record.get("system") is not None else ""
    before = (Message(SYSTEM, _valid(system, "system", place)),) if system else ()
    return Branch((*before, *said), response)


def _said(record: _Record, column: str, place: str, role: str) -> tuple[Message, ...]:
    """Return a column that is a list of messages, or a text of ``role``."""
    value = record.get(column)
    if isinstance(value, str):
        return (Message(role, _valid(value, column, place)),)
    if not isinstance(value, list) or not value:
        got = _shown(value) if column in record else f"only columns {', '.join(record)}"
        raise ConfigError(f"{place}: expected '{column}' as a text or chat messages, got {got}")
    return _messages(value, column, place, _STANDARD)


def _messages(value: object, column: str, place: str, keys: tuple[str, str]) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise ConfigError(
            f"{place}: expected '{column}' as a list of messages, got {_shown(value)}"
        )
    return tuple(_message(item, column, place, keys) for item in value)


def _message(item: object, column: str, place: str, keys: tuple[str, str]) -> Message:
    """Return a message whose role and text lie under ``keys``; all else it has goes with it.

    A text may be null where there is something else.
    """
    role, text = (item.get(key) if isinstance(item, dict) else None for key in keys)
    others = {} if not isinstance(item, dict) else {k: v for k, v in item.items() if k not in keys}
    more = {key: value for key, value in others.items() if value is not None}
    if not isinstance(role, str) or not (isinstance(text, str) or (text is None and more)):
        raise ConfigError(
            f"{place}: expected texts '{keys[0]}' and '{keys[1]}' in a message of '{column}', "
            f"got {_shown(item)}"
        )
    for string in strings_of([text, more]):
        _valid(string, column, place)
    return Message(_SPEAKERS.get(role, role), text, more)


def _without_nulls(row: _Record) -> _Record:
    """Return a row of a columnar file, whose structs have the fields of all rows, as it was."""
    return {name: _bare(value) for name, value in row.items()}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items() if item is not None}
    return [_bare(item) for item in value] if isinstance(value, list) else value


def _valid(text: str, column: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        raise ConfigError(f"{place}: '{column}' is not valid Unicode; repair the row") from None
    return text


def _shown(value: object) -> str:
    return f"{str(value)[:60]!r}"
