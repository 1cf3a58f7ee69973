"""How a dialogue becomes text and ids: by the model's own chat template, or by none.

The template is applied to text and tokenised here, without the tokenizer's own special tokens: a
BOS is there where the template writes one, and never twice. Prompt and response are tokenised
apart; the prompt ends with the header that opens the assistant's turn.

What closes a response is read off the template: the first special token it writes after the
response's text. What it writes after that (a line break, say) belongs to no response: the model
stops at that token. A template that closes with no special token is given the EOS.
"""

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from schemas.errors import ConfigError
from stages.sources.dialogues.dialogue import ASSISTANT, USER, Message, UnusablePair
from stages.sources.reading.tokens import IdArray, TemplateRefusal, TextTokenizer

_TRANSCRIPT_NAMES = {USER: "Human", ASSISTANT: "Assistant"}
_SHORTEST = (Message(USER, "a"), Message(ASSISTANT, "b"))


class Wording(Protocol):
    """Text of a prompt, and ids of it and of a finished response to it."""

    def prompt_text(self, prompt: Sequence[Message]) -> str:
        """Return all that stands before a response."""

    def prompt_ids(self, text: str) -> IdArray:
        """Return the ids of a prompt's text, BOS included where the model wants one."""

    def response_ids(self, prompt: Sequence[Message], response: str) -> IdArray:
        """Return the ids of a response that ends by itself: its last token closes the turn."""


def special_pattern(tokenizer: TextTokenizer) -> re.Pattern[str]:
    """Return what matches the spelling of any special token; its one group is all of it."""
    spelled = "|".join(map(re.escape, tokenizer.special_texts))
    return re.compile(f"({spelled or '(?!)'})")


class ChatWording:
    """The tokenizer's own chat template; raises ConfigError where it cannot serve."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Try the template on the shortest dialogue."""
        if not tokenizer.has_chat_template:
            raise ConfigError(
                f"template: the tokenizer in {tokenizer.folder} has no chat template; save one "
                f"there as chat_template.jinja, or use template: plain"
            )
        self.tokenizer = tokenizer
        self._special = special_pattern(tokenizer)
        try:
            for header in (True, False):
                tokenizer.render_chat(_as_dicts(_SHORTEST[: 2 - header]), header=header)
        except TemplateRefusal as error:
            raise ConfigError(
                f"template: the chat template in {tokenizer.folder} cannot write a question and "
                f"its answer: {error}; repair it, or use template: plain"
            ) from error

    def prompt_text(self, prompt: Sequence[Message]) -> str:
        """Return the dialogue with the header of the assistant's turn; raises UnusablePair."""
        return self._written(prompt, header=True)

    def prompt_ids(self, text: str) -> IdArray:
        """Return the ids of a prompt's text: the template has written any BOS."""
        return self.tokenizer.encode([text])[0]

    def response_ids(self, prompt: Sequence[Message], response: str) -> IdArray:
        """Return the ids of what the template writes after the header, up to the closing token.

        Raises UnusablePair where the template refuses or rewrites the response, ConfigError where
        what it writes of the dialogue does not begin with what it writes of the prompt.
        """
        before = self.prompt_text(prompt)
        whole = self._written((*prompt, Message(ASSISTANT, response)), header=False)
        if not whole.startswith(before):
            raise ConfigError(
                f"template: the chat template in {self.tokenizer.folder} writes a dialogue that "
                f"does not begin with its prompt and header; repair it, or use template: plain"
            )
        text, is_closed = self._until_closed(whole[len(before) :], response)
        ids_A = self.tokenizer.encode_part(text)
        return ids_A if is_closed else np.append(ids_A, eos_of(self.tokenizer))

    def _written(self, messages: Sequence[Message], *, header: bool) -> str:
        try:
            return self.tokenizer.render_chat(_as_dicts(messages), header=header)
        except TemplateRefusal as error:
            raise UnusablePair("refused_by_template") from error

    def _until_closed(self, text: str, response: str) -> tuple[str, bool]:
        """Cut after the closing token; where there is none, drop the blanks at the end."""
        bare = response.strip()  # as most templates write it
        pieces = self._special.split(text)  # plain text and special tokens in turn
        holding = [index for index in range(0, len(pieces), 2) if bare in pieces[index]]
        if not holding:
            raise UnusablePair("changed_by_template")
        if holding[-1] + 1 < len(pieces):
            return "".join(pieces[: holding[-1] + 2]), True
        return text.rstrip(), False


class PlainWording:
    """No template: the prompt's text, the response's text, EOS.

    ``is_transcript`` writes turns as HH-RLHF does. Raises ConfigError for a tokenizer without EOS.
    """

    def __init__(self, tokenizer: TextTokenizer, *, is_transcript: bool) -> None:
        """Look for the EOS."""
        self.tokenizer = tokenizer
        self.is_transcript = is_transcript
        self.eos_id = eos_of(tokenizer)

    def prompt_text(self, prompt: Sequence[Message]) -> str:
        """Return the text as it is; raises ConfigError where there is more than one."""
        if self.is_transcript:
            turns = (f"\n\n{_TRANSCRIPT_NAMES[turn.role]}: {turn.text}" for turn in prompt)
            return f"{''.join(turns)}\n\n{_TRANSCRIPT_NAMES[ASSISTANT]}:"
        if len(prompt) != 1:
            raise ConfigError(
                f"template: plain takes prompts that are one text, got {len(prompt)} messages; "
                f"use template: chat"
            )
        return prompt[0].text

    def prompt_ids(self, text: str) -> IdArray:
        """Return the ids of a prompt's text after what the tokenizer itself puts first."""
        return np.concatenate([self.tokenizer.prefix_ids, *self.tokenizer.encode([text])])

    def response_ids(self, prompt: Sequence[Message], response: str) -> IdArray:
        """Return the ids of the text, and EOS."""
        text = f" {response}" if self.is_transcript else response
        return np.append(self.tokenizer.encode_part(text), self.eos_id)


def eos_of(tokenizer: TextTokenizer) -> np.uint32:
    """Return the token that ends a sequence; raises ConfigError where there is none."""
    if tokenizer.eos_id is None:
        raise ConfigError(
            f"template: nothing ends a response: the tokenizer in {tokenizer.folder} has no "
            f"end-of-sequence token; set its eos_token"
        )
    return np.uint32(tokenizer.eos_id)


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in messages]
