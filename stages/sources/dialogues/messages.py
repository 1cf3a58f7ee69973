"""Columns of a record that hold messages, as the formats that people keep chats in spell them.

Text is kept as it stands; what else a message holds (tool calls, thoughts) goes with it. A content
in parts, as OpenAI's interface has it, is read where all of its parts are text.
"""

from typing import Any

from stages.sources.dialogues.dialogue import ASSISTANT, USER, Message, strings_of
from stages.sources.reading.lines import field_of, shown, valid
from stages.sources.reading.rejects import MalformedRecord

STANDARD, SHAREGPT = ("role", "content"), ("from", "value")  # keys of a speaker and of a text
_SPEAKERS = {"human": USER, "gpt": ASSISTANT}


def text_or_messages(record: dict[str, Any], column: str, role: str) -> tuple[Message, ...]:
    """Return a column that is a list of messages, or a text of ``role``.

    Raises MalformedRecord, as all functions here do.
    """
    value = field_of(record, column, "a text or chat messages")
    if isinstance(value, str):
        return (Message(role, valid(value, column)),)
    if not isinstance(value, list) or not value:
        raise MalformedRecord(
            "bad_messages", f"'{column}' is {shown(value)}, expected a text or chat messages"
        )
    return messages_of(value, column, STANDARD)


def messages_of(value: object, column: str, keys: tuple[str, str]) -> tuple[Message, ...]:
    """Return a list of messages whose roles and texts lie under ``keys``."""
    if not isinstance(value, list) or not value:
        raise MalformedRecord(
            "bad_messages", f"'{column}' is {shown(value)}, expected a list of messages"
        )
    return tuple(message_of(item, column, keys) for item in value)


def message_of(item: object, column: str, keys: tuple[str, str]) -> Message:
    """Return a message whose role and text lie under ``keys``; all else it has goes with it.

    A text may be null where there is something else.
    """
    role, text = (item.get(key) if isinstance(item, dict) else None for key in keys)
    others = {} if not isinstance(item, dict) else {k: v for k, v in item.items() if k not in keys}
    more = {key: value for key, value in others.items() if value is not None}
    if isinstance(text, list):
        text = _joined(text)
    if not isinstance(role, str) or not (isinstance(text, str) or (text is None and more)):
        raise MalformedRecord(
            "bad_messages",
            f"expected texts '{keys[0]}' and '{keys[1]}' in a message of '{column}', got "
            f"{shown(item)}",
        )
    for string in strings_of([text, more]):
        valid(string, column)
    return Message(_SPEAKERS.get(role, role), text, more)


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a columnar file, whose structs have the fields of all rows, as it was."""
    return {name: _bare(value) for name, value in row.items()}


def _joined(parts: list[Any]) -> Any:
    """Return the text of parts that are all text, else the parts."""
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    is_text = len(texts) == len(parts) > 0 and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if is_text else parts


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items() if item is not None}
    return [_bare(item) for item in value] if isinstance(value, list) else value
