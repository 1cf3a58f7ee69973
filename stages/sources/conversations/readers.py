"""Records of the four formats -> conversations, nothing of them judged yet."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stages.sources.conversations.stage import ChatColumns, ChatFiles, HubChats
from stages.sources.dialogues.dialogue import ASSISTANT, SYSTEM, USER, Message
from stages.sources.dialogues.messages import (
    SHAREGPT,
    STANDARD,
    messages_of,
    text_or_messages,
    without_nulls,
)
from stages.sources.reading.lines import field_of, text_of
from stages.sources.reading.records import read_records
from stages.sources.reading.rejects import MalformedRecord, Rejects
from stages.sources.reading.source import RowFiles

_Record = dict[str, Any]
_Said = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class RawConversation:
    """Who said what, and the tools that were there, as the row has them; ``place`` is its own."""

    place: str
    messages: _Said
    tools: object = None


def read_conversations(source: ChatFiles | HubChats, rejects: Rejects) -> Iterator[RawConversation]:
    """Yield them in order; a record that lacks or misspells a part goes to ``rejects``."""
    said_of = {
        "messages": _messages,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "prompt_completion": _prompt_completion,
    }
    read = said_of[source.format]
    for place, row in read_records(source, rejects):
        is_json = isinstance(source, RowFiles) and source.is_json
        record = row if is_json else without_nulls(row)
        try:
            said = read(source, record)
        except MalformedRecord as error:
            rejects.add(place, error)
        else:
            yield RawConversation(place, said, record.get("tools"))


def _messages(source: ChatColumns, record: _Record) -> _Said:
    column = source.column or "messages"
    return messages_of(field_of(record, column, "a list of messages"), column, STANDARD)


def _sharegpt(source: ChatColumns, record: _Record) -> _Said:
    column = source.column or "conversations"
    said = messages_of(field_of(record, column, "a list of messages"), column, SHAREGPT)
    return (*_system(record), *said)


def _alpaca(source: ChatColumns, record: _Record) -> _Said:
    asked = text_of(record, "instruction")
    if record.get("input") is not None and (more := text_of(record, "input")):
        asked = f"{asked}\n{more}"
    answer = Message(ASSISTANT, text_of(record, "output"))
    return (*_system(record), Message(USER, asked), answer)


def _prompt_completion(source: ChatColumns, record: _Record) -> _Said:
    prompt = text_or_messages(record, "prompt", USER)
    return (*prompt, *text_or_messages(record, "completion", ASSISTANT))


def _system(record: _Record) -> _Said:
    text = text_of(record, "system") if record.get("system") is not None else ""
    return (Message(SYSTEM, text),) if text else ()
