"""A dialogue before it has tokens: who said what.

A prompt is an optional system message, then turns that alternate and both begin and end with the
user's.
"""

from dataclasses import dataclass

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says."""

    role: str
    text: str


class UnusablePair(Exception):
    """A pair that cannot become a row; ``reason`` is what it is counted under."""

    def __init__(self, reason: str) -> None:
        """Keep the reason."""
        super().__init__(reason)
        self.reason = reason


def parts_of(prompt: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the system message (or nothing), and the turns."""
    has_system = bool(prompt) and prompt[0].role == SYSTEM
    return prompt[:has_system], prompt[has_system:]
