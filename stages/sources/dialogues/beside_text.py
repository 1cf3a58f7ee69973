"""What a row says beside texts: tools that it offers, calls of them, thoughts.

Templates read tools and calls as objects. Many data sets keep either as JSON in a text, as a column
of structs would give each call the arguments of all others; a template that writes JSON would write
such a text in quotes once more.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stages.sources.dialogues.dialogue import Message, UnusableDialogue

Tools = tuple[dict[str, Any], ...]
REASONING = ("reasoning_content", "reasoning", "thinking")
_SAID = ("tool_calls", "function_call", *REASONING)


def as_read(message: Message, reads: Callable[[str], bool]) -> Message:
    """Return the message with the keys alone that a template reads.

    Raises UnusableDialogue where it would lose what it says (``unread_`` and the key), or where
    that is malformed (``bad_reasoning``, ``bad_tool_calls``). Other keys, an ``id``, say nothing.
    """
    for key in _SAID:
        if message.more.get(key) and not reads(key):
            raise UnusableDialogue(f"unread_{key}")
    read = {key: value for key, value in message.more.items() if reads(key)}
    if any(not isinstance(read.get(key, ""), str) for key in REASONING):
        raise UnusableDialogue("bad_reasoning")
    if "tool_calls" in read:
        read["tool_calls"] = calls_of(read["tool_calls"])
    return replace(message, more=read)


def tools_of(value: object) -> Tools:
    """Return a row's tools, none for null or nothing; raises UnusableDialogue (``bad_tools``)."""
    tools = _parsed(value, "bad_tools") if value else []
    if not isinstance(tools, list):
        raise UnusableDialogue("bad_tools")
    objects = [_parsed(tool, "bad_tools") for tool in tools]
    if not all(isinstance(tool, dict) for tool in objects):
        raise UnusableDialogue("bad_tools")
    return tuple(objects)


def calls_of(value: object) -> list[dict[str, Any]]:
    """Return a message's calls with their arguments as objects.

    Raises UnusableDialogue (``bad_tool_calls``) for what is no list of named calls.
    """
    calls = _parsed(value, "bad_tool_calls") if value else []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UnusableDialogue("bad_tool_calls")
    return [_with_arguments(call) for call in calls]


def names_of(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what each call calls."""
    return [str(call.get("function", call)["name"]) for call in calls]


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not name or not isinstance(name, str):
        raise UnusableDialogue("bad_tool_calls")
    arguments = _parsed(function.get("arguments") or {}, "bad_tool_calls")
    if not isinstance(arguments, dict):
        raise UnusableDialogue("bad_tool_calls")
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def _parsed(value: object, reason: str) -> Any:
    """Return what a JSON text spells, any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UnusableDialogue(reason) from error
