"""Which parts of a conversation's text an assistant said, found from its chat template.

Two ways, and no third: the template marks answers itself, or an answer is what the whole text has
where the text before it, with the header that opens an answer, ends, and is there what the template
wrote when that answer was the last. A template that writes an answer otherwise once more follows
(thoughts are dropped, say) has not said it there: that answer's row ends with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stages.sources.dialogues.beside_text import Tools
from stages.sources.dialogues.dialogue import ASSISTANT, Message, UnusableDialogue
from stages.sources.dialogues.wording import ChatWording, require_all_said
from stages.sources.reading.boundary import at_spaces

Turns = Literal["assistant", "last", "all", "none"]


@dataclass(frozen=True, slots=True)
class WordedRow:
    """Text of a row, and the spans of characters in it that are scored, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


def worded_rows(
    wording: ChatWording, said: Sequence[Message], tools: Tools, turns: Turns
) -> list[WordedRow]:
    """Return the rows of a conversation, the one that ends with its last answer first.

    Raises UnusableDialogue with the reason where an answer cannot be found for sure.
    """
    if turns == "none":
        return [WordedRow(wording.prompt_text(said, tools), ())]
    left = [index for index, message in enumerate(said) if message.role == ASSISTANT]
    if not left:
        raise UnusableDialogue("no_assistant_turn")
    if turns != "assistant":
        left = left[-1:]
    rows = []
    while left:
        part = said[: left[-1] + 1]
        text, found = _answers_in(wording, part, tools, left)
        end = found[left[-1]][1]
        spans = [(0, end)] if turns == "all" else sorted(found.values())
        rows.append(WordedRow(text[:end], tuple(spans)))
        left = [index for index in left if index not in found]
    return rows


def _answers_in(
    wording: ChatWording, said: Sequence[Message], tools: Tools, wanted: Sequence[int]
) -> tuple[str, dict[int, tuple[int, int]]]:
    """Return the text of ``said``, and where it has wanted answers, by index; the last is there."""
    text, blocks = wording.marked_text(said, tools)
    if not blocks:
        return text, _unmarked(wording, said, tools, wanted, text)
    answers = [index for index, message in enumerate(said) if message.role == ASSISTANT]
    if len(blocks) != len(answers):
        raise UnusableDialogue("unmarked_by_template")
    found = {}
    for index, (start, end) in zip(answers, blocks, strict=True):
        if index in wanted:
            start = _after_header(wording, said[:index], tools, text, start, end)
            require_all_said(text[:start], text[start:end], said[index])
            found[index] = len(at_spaces(text[:start])[0]), end
    return text, found


def _after_header(
    wording: ChatWording, said: Sequence[Message], tools: Tools, text: str, start: int, end: int
) -> int:
    """Return where a marked answer begins: not before the end of the header that is written for it.

    A template may open a thought in the header and mark it as the answer's too.
    """
    try:
        header = wording.opening_text(said, tools)
    except UnusableDialogue:
        return start
    return max(start, len(header)) if text[:end].startswith(header) else start


def _unmarked(
    wording: ChatWording, said: Sequence[Message], tools: Tools, wanted: Sequence[int], text: str
) -> dict[int, tuple[int, int]]:
    found = {}
    for index in wanted:
        before, answer = wording.response_text(said[:index], said[index], tools)
        if text.startswith(before + answer):
            found[index] = len(before), len(before) + len(answer)
    if wanted[-1] not in found:
        raise UnusableDialogue("not_after_header")
    return found
