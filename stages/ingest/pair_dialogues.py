"""What a preference pair is before it has tokens, and which dialogues can be one.

A prompt is an optional system message, then turns that alternate and both begin and end with the
user's; a response is one message of the assistant's.
"""

import re
from dataclasses import dataclass
from itertools import cycle

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Branch:
    """One response and all that was said before it."""

    prompt: tuple[Message, ...]
    response: Message


@dataclass(frozen=True, slots=True)
class RawPair:
    """Two branches of what should be one dialogue; ``place`` is ``file:line``."""

    place: str
    chosen: Branch
    rejected: Branch


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


def require_usable(pair: RawPair, special: re.Pattern[str]) -> None:
    """Raise UnusablePair where the two branches do not make one well-formed dialogue.

    Reasons: prompts_differ, no_user_turn, bad_roles, empty_prompt, empty_response,
    special_token_in_text: a text that spells a token of ``special`` could close its own turn.
    """
    prompt, branches = pair.chosen.prompt, (pair.chosen, pair.rejected)
    responses = [branch.response for branch in branches]
    _, turns = parts_of(prompt)
    roles = [turn.role for turn in turns]
    expected = [role for role, _ in zip(cycle((USER, ASSISTANT)), roles, strict=False)]
    texts = [message.text for message in (*prompt, *responses)]
    checks = {
        "prompts_differ": prompt != pair.rejected.prompt,
        "no_user_turn": USER not in roles,
        "bad_roles": roles != expected
        or roles[-1:] != [USER]
        or any(response.role != ASSISTANT for response in responses),
        "empty_prompt": bool(turns) and not turns[-1].text.strip(),
        "empty_response": not all(response.text.strip() for response in responses),
        "special_token_in_text": any(special.search(text) for text in texts),
    }
    for reason, is_so in checks.items():
        if is_so:
            raise UnusablePair(reason)
