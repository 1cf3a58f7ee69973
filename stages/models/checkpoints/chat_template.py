"""A tokenizer's chat template: the text it writes of a dialogue, and which tokens part its turns.

One definition for all who ask (pairs, generation, guards): a turn of the assistant's ends with the
first mark that the template writes behind an answer. A mark is a special token, or another one that
was added to the vocabulary and is spelled as no word or blank is (``<end>``, say): some folders do
not call their own closing token special.

The date is one fixed date, or templates that print today's would make other ids every day.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes

_TODAY = date(2024, 7, 26)  # as Llama 3.2's template says where it knows no date
_ANSWER = "0123456789"
_ASKED = ({"role": "user", "content": "?"},)
_ANSWERED = (*_ASKED, {"role": "assistant", "content": _ANSWER})
_WITH_SYSTEM = ({"role": "system", "content": "!"}, *_ASKED)
# What a template does to values it cannot write: jinja's own errors, and those of Python beneath.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_LIKE_A_MARK = re.compile(r"\w[^\w\s]|[^\w\s]\w")  # neither a word, nor blanks, nor dots alone
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers' own


class TemplateRefusal(Exception):
    """A chat template that will not write these messages; the message is its own first line."""


class ChatTemplate:
    """The template of a loaded tokenizer, with a recipe's ``chat_template_kwargs``."""

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any] | None = None) -> None:
        """Write nothing yet."""
        self._tokenizer = tokenizer
        self._settings = dict(settings or {})

    @property
    def is_there(self) -> bool:
        """Whether the tokenizer has a template at all."""
        template = self._tokenizer.chat_template
        return "default" in template if isinstance(template, dict) else bool(template)

    def write(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        header: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Return the text of some messages; ``header`` adds what opens the assistant's turn.

        Raises TemplateRefusal.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=header,
                strftime_now=_TODAY.strftime,
                **self._settings,
            )
        except _REFUSALS as error:
            raise _refusal(error) from error
        return text

    def write_marked(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of some messages, and where its ``{% generation %}`` blocks stand.

        Blocks are in characters, one for each answer that the template marks. A template without
        such marks has no block. Raises TemplateRefusal.
        """
        from transformers.utils.chat_template_utils import render_jinja_template  # loads torch

        source = self._tokenizer.get_chat_template(tools=list(tools) or None)
        if not _GENERATION.search(source):
            return self.write(messages, header=False, tools=tools), []
        try:
            (text,), (blocks,) = render_jinja_template(
                [[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=source,
                return_assistant_tokens_mask=True,
                strftime_now=_TODAY.strftime,
                **{**self._tokenizer.special_tokens_map, **self._settings},
            )
        except _REFUSALS as error:
            raise _refusal(error) from error
        return text, [(int(start), int(end)) for start, end in blocks]

    def reads(self, key: str, *, with_tools: bool = False) -> bool:
        """Return whether the template that writes such rows names this key of a message.

        Raises TemplateRefusal for a template that is not Jinja.
        """
        return key in self._fields[with_tools]

    @property
    def unread_settings(self) -> list[str]:
        """The settings that no template of the tokenizer reads; raises TemplateRefusal."""
        return sorted(set(self._settings) - self._variables)

    @cached_property
    def closing_text(self) -> str | None:
        """How the token is spelled that ends the assistant's turn; None: the template has none.

        Raises TemplateRefusal for a template that cannot write a question and its answer.
        """
        _, answer, behind = self.write(_ANSWERED, header=False).rpartition(_ANSWER)
        return next(iter(self._marks.findall(behind if answer else "")), None)

    @cached_property
    def turn_texts(self) -> tuple[str, ...]:
        """How the tokens are spelled that part turns: text with one of them is no longer one turn.

        All of a user's turn, the one that opens the assistant's, and the one that ends it. What
        may open a thought is not among them: responses may spell that out.
        """
        found = {self.closing_text} - {None}
        for turns in (_WITH_SYSTEM, _ASKED):
            with suppress(TemplateRefusal):  # of a system's turn, say
                asked = self.write(turns, header=False)
                header = self.write(turns, header=True).removeprefix(asked)
                found |= {*self._marks.findall(asked), *self._marks.findall(header)[:1]}
        return tuple(sorted(text for text in found if text))

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        marks = {one.content for one in added if one.special or _LIKE_A_MARK.search(one.content)}
        return any_of(marks.union(self._tokenizer.all_special_tokens))

    @cached_property
    def _fields(self) -> dict[bool, frozenset[str]]:
        """Attributes and text constants of the template for rows without tools, and with them."""
        found = {}
        for with_tools in (False, True):
            tree = _parsed(self._tokenizer.get_chat_template(tools=[] if with_tools else None))
            names = {node.attr for node in tree.find_all(nodes.Getattr)}
            texts = {node.value for node in tree.find_all(nodes.Const)}
            found[with_tools] = frozenset(names | {text for text in texts if isinstance(text, str)})
        return found

    @cached_property
    def _variables(self) -> set[str]:
        template = self._tokenizer.chat_template
        sources = template.values() if isinstance(template, dict) else [template]
        return {name for text in sources for name in meta.find_undeclared_variables(_parsed(text))}


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return what matches any of some spellings, the longest first; blank ones are left out."""
    spelled = sorted({text for text in texts if text.strip()}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, spelled)) or "(?!)")


def _parsed(source: str) -> nodes.Template:
    try:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        return environment.parse(_GENERATION.sub("", source))
    except TemplateError as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> TemplateRefusal:
    return TemplateRefusal(str(error).splitlines()[0] if str(error) else "")
