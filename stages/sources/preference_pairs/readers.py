"""Records of the three formats -> pairs of dialogues, nothing of them judged yet.

Text is kept as it stands, but for HH-RLHF transcripts, whose spaces around a turn are punctuation.
What else a message holds (tool calls, thoughts) goes with it, and ``tools`` with the row.
"""

import re
from collections.abc import Iterator
from typing import Any

from stages.sources.dialogues.dialogue import ASSISTANT, SYSTEM, USER, Message, strings_of
from stages.sources.preference_pairs.pairs import Branch, RawPair
from stages.sources.preference_pairs.stage import HubPairs, PairColumns, PairFiles
from stages.sources.reading.lines import field_of, shown, text_of, valid
from stages.sources.reading.records import read_records
from stages.sources.reading.rejects import MalformedRecord, Rejects

_STANDARD, _SHAREGPT = ("role", "content"), ("from", "value")
_SPEAKERS = {"human": USER, "gpt": ASSISTANT}
_TRANSCRIPT_SPEAKERS = {"Human": USER, "Assistant": ASSISTANT}
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_Record = dict[str, Any]


def read_pairs(source: PairFiles | HubPairs, rejects: Rejects) -> Iterator[RawPair]:
    """Yield the pairs in order; a record that lacks or misspells a part goes to ``rejects``."""
    branch_of = {"standard": _standard, "hh_rlhf": _transcript, "sharegpt": _sharegpt}
    read = branch_of[source.format]
    for place, row in read_records(source, rejects):
        record = row if source.kind == "jsonl" else _without_nulls(row)
        try:
            chosen, rejected = (
                read(source, record, column) for column in (source.chosen, source.rejected)
            )
        except MalformedRecord as error:
            rejects.add(place, error)
        else:
            yield RawPair(place, chosen, rejected, record.get("tools"))


def _standard(source: PairColumns, record: _Record, column: str) -> Branch:
    said = _said(record, column, ASSISTANT)
    is_whole = said[0].role in (SYSTEM, USER)
    before = () if is_whole else _said(record, source.prompt, USER)
    return Branch((*before, *said[:-1]), said[-1])


def _transcript(source: PairColumns, record: _Record, column: str) -> Branch:
    text = text_of(record, column)
    before, *pieces = _TURN.split(text.strip())
    if before or not pieces:
        raise MalformedRecord(
            "not_a_transcript",
            f"'{column}' is {shown(text)}, expected a transcript that begins with 'Human:' and "
            f"parts turns by empty lines; or choose another format",
        )
    said = tuple(
        Message(_TRANSCRIPT_SPEAKERS[speaker], words.strip())
        for speaker, words in zip(pieces[::2], pieces[1::2], strict=True)
    )
    return Branch(said[:-1], said[-1])


def _sharegpt(source: PairColumns, record: _Record, column: str) -> Branch:
    said = _messages(
        field_of(record, "conversations", "a list of messages"), "conversations", _SHAREGPT
    )
    response = _message(field_of(record, column, "a message"), column, _SHAREGPT)
    system = text_of(record, "system") if record.get("system") is not None else ""
    before = (Message(SYSTEM, system),) if system else ()
    return Branch((*before, *said), response)


def _said(record: _Record, column: str, role: str) -> tuple[Message, ...]:
    """Return a column that is a list of messages, or a text of ``role``."""
    value = field_of(record, column, "a text or chat messages")
    if isinstance(value, str):
        return (Message(role, valid(value, column)),)
    if not isinstance(value, list) or not value:
        raise MalformedRecord(
            "bad_messages", f"'{column}' is {shown(value)}, expected a text or chat messages"
        )
    return _messages(value, column, _STANDARD)


def _messages(value: object, column: str, keys: tuple[str, str]) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise MalformedRecord(
            "bad_messages", f"'{column}' is {shown(value)}, expected a list of messages"
        )
    return tuple(_message(item, column, keys) for item in value)


def _message(item: object, column: str, keys: tuple[str, str]) -> Message:
    """Return a message whose role and text lie under ``keys``; all else it has goes with it.

    A text may be null where there is something else.
    """
    role, text = (item.get(key) if isinstance(item, dict) else None for key in keys)
    others = {} if not isinstance(item, dict) else {k: v for k, v in item.items() if k not in keys}
    more = {key: value for key, value in others.items() if value is not None}
    if not isinstance(role, str) or not (isinstance(text, str) or (text is None and more)):
        raise MalformedRecord(
            "bad_messages",
            f"expected texts '{keys[0]}' and '{keys[1]}' in a message of '{column}', got "
            f"{shown(item)}",
        )
    for string in strings_of([text, more]):
        valid(string, column)
    return Message(_SPEAKERS.get(role, role), text, more)


def _without_nulls(row: _Record) -> _Record:
    """Return a row of a columnar file, whose structs have the fields of all rows, as it was."""
    return {name: _bare(value) for name, value in row.items()}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items() if item is not None}
    return [_bare(item) for item in value] if isinstance(value, list) else value
