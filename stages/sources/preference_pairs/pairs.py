"""What a preference pair is before it has tokens, and which two dialogues can be one.

A response is one message of the assistant's, after a prompt whose last turn is the user's.
"""

import re
from dataclasses import dataclass
from itertools import cycle

from stages.sources.dialogues.dialogue import ASSISTANT, USER, Message, UnusablePair, parts_of


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
