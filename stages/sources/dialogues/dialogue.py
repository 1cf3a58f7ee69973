"""A dialogue before it has tokens: who said what.

A prompt is an optional system message, then exchanges that begin with the user's turn and end with
the assistant's, which may call tools and read their answers in between. The last exchange is open:
it ends with the user's turn, or with the tools' answers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says: its text (None: null), and all else that is known of it, by key."""

    role: str
    text: str | None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The text; nothing where there is none."""
        return self.text or ""

    @property
    def strings(self) -> Iterator[str]:
        """Every text in the message."""
        yield from strings_of([self.words, self.more])

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates read it."""
        return {"role": self.role, "content": self.text} | dict(self.more)


class UnusableDialogue(Exception):
    """A pair that cannot become a row; ``reason`` is what it is counted under."""

    def __init__(self, reason: str) -> None:
        """Keep the reason."""
        super().__init__(reason)
        self.reason = reason


def strings_of(value: object) -> Iterator[str]:
    """Yield every text in a value as JSON spells it, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *strings_of(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)


def parts_of(prompt: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the system message (or nothing), and the turns."""
    has_system = bool(prompt) and prompt[0].role == SYSTEM
    return prompt[:has_system], prompt[has_system:]
