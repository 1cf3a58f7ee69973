"""How a dialogue becomes text and ids: by the model's own chat template, or by none.

The template is applied to text and tokenised here, without the tokenizer's own special tokens: a
BOS is there where the template writes one, and never twice. Prompt and response are tokenised
apart. The prompt is what a model is given to go on from: the dialogue and the header that opens
the assistant's turn, an opened or an empty thought included; the response is what the template
writes of the whole dialogue after that. Spaces at the prompt's end go with the response.

What closes a response is read off the template (``checkpoints.chat_template``). What it writes
after that (a line break, say) belongs to no response: the model stops at that token. A template
that closes with no token of its own is given the EOS.

A response that is not what the model would have to write is none: where the whole dialogue does not
begin with the header (``not_after_header``) or not with the prompt (``prompt_not_kept``: Mistral's
templates leave a system turn out once its question is answered), where the template puts an empty
thought into it that nobody thought (``empty_reasoning``), or leaves it open
(``unclosed_by_template``).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from schemas.errors import ConfigError
from stages.models.checkpoints.chat_template import TemplateRefusal, any_of
from stages.sources.dialogues.beside_text import REASONING, Tools, names_of
from stages.sources.dialogues.dialogue import ASSISTANT, USER, Message, UnusableDialogue
from stages.sources.reading.boundary import at_spaces
from stages.sources.reading.tokens import IdArray, TextTokenizer

_TRANSCRIPT_NAMES = {USER: "Human", ASSISTANT: "Assistant"}
_SHORTEST = (Message(USER, "a"), Message(ASSISTANT, "b"))
_EMPTY_BLOCK = re.compile(r"([<\[◁])([^\s<>\[\]◁▷/]+)([>\]▷])\s*\1/\2\3")  # <think> </think>
_HEADER_CHARS = 200  # of a prompt, in which a header may have opened such a block


class Wording(Protocol):
    """Text of a prompt, and ids of it and of a finished response to it."""

    marks: re.Pattern[str]  # what no text may spell: it could end its own turn

    def reads(self, key: str, *, with_tools: bool) -> bool:
        """Return whether a key of a message has any effect on what is written."""

    def prompt_text(self, prompt: Sequence[Message], tools: Tools = ()) -> str:
        """Return all that stands before a response."""

    def prompt_ids(self, text: str) -> IdArray:
        """Return the ids of a prompt's text, BOS included where the model wants one."""

    def response_ids(
        self, prompt: Sequence[Message], response: Message, tools: Tools = ()
    ) -> IdArray:
        """Return the ids of a response that ends by itself: its last token closes the turn."""


class ChatWording:
    """The tokenizer's own chat template; raises ConfigError where it cannot serve."""

    def __init__(self, tokenizer: TextTokenizer, settings: Mapping[str, Any]) -> None:
        """Try the template, with ``settings``, on the shortest dialogue."""
        self.tokenizer = tokenizer
        self._template = tokenizer.chat_template(settings)
        if not self._template.is_there:
            raise ConfigError(
                f"template: the tokenizer in {tokenizer.folder} has no chat template; save one "
                f"there as chat_template.jinja, or use template: plain"
            )
        try:
            for header in (True, False):
                shortest = [message.as_dict() for message in _SHORTEST[: 2 - header]]
                self._template.write(shortest, header=header)
                self._template.reads("content", with_tools=header)
            self._closing = self._template.closing_text
            self._require_header()
            unread = self._template.unread_settings
        except TemplateRefusal as error:
            raise ConfigError(
                f"template: the chat template in {tokenizer.folder} cannot write a question and "
                f"its answer: {error}; repair it, or use template: plain"
            ) from error
        if unread:
            raise ConfigError(
                f"chat_template_kwargs: the chat template in {tokenizer.folder} reads no "
                f"{', '.join(unread)}; correct the name, or leave it out"
            )
        self.marks = any_of((*tokenizer.special_texts, *self._template.turn_texts))

    def _require_header(self) -> None:
        """Refuse a template that opens an answer and does not where one is asked for."""
        asked, answered = ([message.as_dict() for message in _SHORTEST[:n]] for n in (1, 2))
        prompt = self._template.write(asked, header=True)
        whole = self._template.write(answered, header=False)
        if prompt != self._template.write(asked, header=False) or not whole.startswith(prompt):
            return
        if not whole[len(prompt) :].lstrip().startswith(_SHORTEST[1].words):
            raise ConfigError(
                f"template: the chat template in {self.tokenizer.folder} writes "
                f"{whole[len(prompt) :].partition(_SHORTEST[1].words)[0]!r} before an answer, and "
                f"not where one is asked for: it has no branch for add_generation_prompt; add it, "
                f"or use template: plain where there is one"
            )

    def reads(self, key: str, *, with_tools: bool) -> bool:
        """Return whether the template names this key."""
        return self._template.reads(key, with_tools=with_tools)

    def prompt_text(self, prompt: Sequence[Message], tools: Tools = ()) -> str:
        """Return the dialogue with the header of the assistant's turn; raises UnusableDialogue."""
        written = self._written(prompt, header=True, tools=tools)
        if tools and written == self._written(prompt, header=True):
            raise UnusableDialogue("unread_tools")
        return at_spaces(written)[0]

    def prompt_ids(self, text: str) -> IdArray:
        """Return the ids of a prompt's text: the template has written any BOS."""
        return self.tokenizer.encode([text])[0]

    def response_ids(
        self, prompt: Sequence[Message], response: Message, tools: Tools = ()
    ) -> IdArray:
        """Return the ids of what the template writes after the header, up to the closing token.

        Raises UnusableDialogue where that is not what the response says.
        """
        _, text = self.response_text(prompt, response, tools)
        ids_A = part_ids(self.tokenizer, text)
        return ids_A if self.closes else np.append(ids_A, eos_of(self.tokenizer))

    def response_text(
        self, prompt: Sequence[Message], response: Message, tools: Tools = ()
    ) -> tuple[str, str]:
        """Return what stands before a response, and its own text up to what closes it."""
        before = self._written(prompt, header=True, tools=tools)
        whole = self._written((*prompt, response), header=False, tools=tools)
        if not whole.startswith(before):
            is_kept = whole.startswith(self._written(prompt, header=False, tools=tools).rstrip())
            raise UnusableDialogue("not_after_header" if is_kept else "prompt_not_kept")
        written = whole[len(before) :]
        require_all_said(before, written, response)
        bare, spaces = at_spaces(before)
        return bare, spaces + self._until_closed(written)

    def marked_text(
        self, messages: Sequence[Message], tools: Tools = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a dialogue's text, and where the template itself says that answers stand.

        ``[start, end)`` in characters, of each answer; none where the template marks none. An end
        is moved to what closes the turn: templates mark line breaks behind it too, or leave it out.
        """
        said = [message.as_dict() for message in messages]
        try:
            text, blocks = self._template.write_marked(said, tools=tools)
        except TemplateRefusal as error:
            raise UnusableDialogue("refused_by_template") from error
        if tools and text == self._written(messages, header=False):
            raise UnusableDialogue("unread_tools")
        return text, [(start, self._closed_end(text, start, end)) for start, end in blocks]

    def opening_text(self, prompt: Sequence[Message], tools: Tools = ()) -> str:
        """Return all that is written before a response, spaces included."""
        return self._written(prompt, header=True, tools=tools)

    @property
    def closes(self) -> bool:
        """Whether the template closes answers with a token of its own."""
        return self._closing is not None

    def _closed_end(self, text: str, start: int, end: int) -> int:
        """Return where a block that ends at ``end`` is closed."""
        if self._closing is None:
            return start + len(text[start:end].rstrip())
        inside = text.rfind(self._closing, start, end)
        if inside >= 0 and not text[inside + len(self._closing) : end].strip():
            return inside + len(self._closing)
        behind = text[end:]
        skipped = len(behind) - len(behind.lstrip())
        if behind.startswith(self._closing, skipped):
            return end + skipped + len(self._closing)
        raise UnusableDialogue("unclosed_by_template")

    def _written(self, messages: Sequence[Message], *, header: bool, tools: Tools = ()) -> str:
        said = [message.as_dict() for message in messages]
        try:
            return self._template.write(said, header=header, tools=tools)
        except TemplateRefusal as error:
            raise UnusableDialogue("refused_by_template") from error

    def _until_closed(self, text: str) -> str:
        """Cut after the closing token; where there is none, drop the blanks at the end."""
        if self._closing is None:
            return text.rstrip()
        end = text.rfind(self._closing)
        if end < 0:
            raise UnusableDialogue("unclosed_by_template")
        return text[: end + len(self._closing)]


def require_all_said(before: str, written: str, response: Message) -> None:
    """Raise UnusableDialogue where a template lost a part of a response, or put a thought in it."""
    thoughts = [response.more.get(key, "").strip() for key in REASONING]
    calls = names_of(response.more.get("tool_calls") or ())
    said = (*thoughts, response.words.strip(), *calls)
    if any(part not in written for part in said):
        raise UnusableDialogue("changed_by_template")
    if any(thoughts):
        return
    start = max(0, len(before) - _HEADER_CHARS)
    for block in _EMPTY_BLOCK.finditer(before[start:] + written):
        in_header = start + block.end() <= len(before)
        if not in_header and not any(block.group() in text for text in response.strings):
            raise UnusableDialogue("empty_reasoning")


def prompt_not_kept(folder: str) -> str:
    """Return what helps where the template in ``folder`` rewrites a prompt once it is answered."""
    return (
        f"the chat template in {folder} writes a prompt otherwise once it is answered (some leave "
        f"out a system turn): put that turn's text into the first user turn, or save another "
        f"chat_template.jinja"
    )


class PlainWording:
    """No template: the prompt's text, the response's text, EOS.

    ``is_transcript`` writes turns as HH-RLHF does. Raises ConfigError for a tokenizer without EOS.
    """

    def __init__(self, tokenizer: TextTokenizer, *, is_transcript: bool) -> None:
        """Look for the EOS."""
        self.tokenizer = tokenizer
        self.is_transcript = is_transcript
        self.eos_id = eos_of(tokenizer)
        self.marks = any_of(tokenizer.special_texts)

    def reads(self, key: str, *, with_tools: bool) -> bool:
        """Return False: texts alone are written."""
        return False

    def prompt_text(self, prompt: Sequence[Message], tools: Tools = ()) -> str:
        """Return the text as it is, but for spaces at its end; raises UnusableDialogue."""
        if tools:
            raise UnusableDialogue("unread_tools")
        return at_spaces(self._text(prompt))[0]

    def prompt_ids(self, text: str) -> IdArray:
        """Return the ids of a prompt's text after what the tokenizer itself puts first."""
        return np.concatenate([self.tokenizer.prefix_ids, *self.tokenizer.encode([text])])

    def response_ids(
        self, prompt: Sequence[Message], response: Message, tools: Tools = ()
    ) -> IdArray:
        """Return the ids of the text, and EOS; raises UnusableDialogue."""
        spaces = at_spaces(self._text(prompt))[1]
        return np.append(part_ids(self.tokenizer, spaces + response.words), self.eos_id)

    def _text(self, prompt: Sequence[Message]) -> str:
        """Return what stands before a response, spaces included; raises UnusableDialogue."""
        if self.is_transcript:
            turns = (f"\n\n{_TRANSCRIPT_NAMES[turn.role]}: {turn.words}" for turn in prompt)
            return f"{''.join(turns)}\n\n{_TRANSCRIPT_NAMES[ASSISTANT]}: "
        if len(prompt) != 1:
            raise UnusableDialogue("several_messages")
        return prompt[0].words


def part_ids(tokenizer: TextTokenizer, text: str) -> IdArray:
    """Return the ids of a text behind another one; raises UnusableDialogue where they join."""
    try:
        return tokenizer.encode_part(text)
    except ConfigError as error:  # a sentencepiece tokenizer that joins it with a line break before
        raise UnusableDialogue("joined_by_tokenizer") from error


def eos_of(tokenizer: TextTokenizer) -> np.uint32:
    """Return the token that ends a sequence; raises ConfigError where there is none."""
    if tokenizer.eos_id is None:
        raise ConfigError(
            f"template: nothing ends a response: the tokenizer in {tokenizer.folder} has no "
            f"end-of-sequence token; set its eos_token"
        )
    return np.uint32(tokenizer.eos_id)
