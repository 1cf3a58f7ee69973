"""What a preference pair is before it has tokens, and which two dialogues can be one.

A response is one message of the assistant's, after a prompt whose last turn is the user's, or what
the tools answered that the assistant called for it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from stages.sources.dialogues.dialogue import (
    ASSISTANT,
    TOOL,
    USER,
    Message,
    UnusableDialogue,
    parts_of,
    strings_of,
)

_LETTERS = {USER: "u", ASSISTANT: "a", TOOL: "t"}
_ROLES = re.compile("(u(at+)*a)*u(at+)*")  # closed exchanges, then one that is open
_SPEAKER = re.compile(r"(?<!\w)Human:|^\s*Assistant:", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Branch:
    """One response and all that was said before it."""

    prompt: tuple[Message, ...]
    response: Message


@dataclass(frozen=True, slots=True)
class RawPair:
    """Two branches of what should be one dialogue; ``place`` is ``file:line``.

    ``tools`` is what the row offers to both, as it stands there.
    """

    place: str
    chosen: Branch
    rejected: Branch
    tools: object = None

    @property
    def responses(self) -> tuple[Message, Message]:
        """The chosen one and the rejected one."""
        return self.chosen.response, self.rejected.response


def require_usable(pair: RawPair, marks: re.Pattern[str]) -> None:
    """Raise UnusableDialogue where the two branches do not make one well-formed dialogue.

    Reasons: prompts_differ, no_user_turn, bad_roles, empty_prompt, empty_response,
    special_token_in_text: a text that spells one of ``marks`` could close its own turn.
    """
    prompt = pair.chosen.prompt
    _, turns = parts_of(prompt)
    roles = "".join(_LETTERS.get(turn.role, "x") for turn in turns)
    asked = [turn for turn in turns if turn.role == USER][-1:]
    strings = [text for message in (*prompt, *pair.responses) for text in message.strings]
    checks = {
        "prompts_differ": prompt != pair.rejected.prompt,
        "no_user_turn": "u" not in roles,
        "bad_roles": not _ROLES.fullmatch(roles)
        or any(response.role != ASSISTANT for response in pair.responses),
        "empty_prompt": any(not turn.words.strip() for turn in asked),
        "empty_response": any(_is_empty(response) for response in pair.responses),
        "special_token_in_text": any(map(marks.search, (*strings, *strings_of(pair.tools)))),
    }
    for reason, is_so in checks.items():
        if is_so:
            raise UnusableDialogue(reason)


def require_one_speaker(responses: Iterable[Message]) -> None:
    """Raise UnusableDialogue (``speaker_in_response``) where a response names who speaks in it.

    In a transcript that is a turn without the empty line that parts turns: 1 in 100 chosen
    responses of HH-RLHF begin with ``Human:`` or run on into what the human would say.
    """
    if any(_SPEAKER.search(response.words) for response in responses):
        raise UnusableDialogue("speaker_in_response")


def _is_empty(response: Message) -> bool:
    return not response.words.strip() and not response.more.get("tool_calls")
