"""Conversations -> rows of the ``conversations`` table.

Rejected and counted: ``no_assistant_turn``, ``bad_roles`` (a speaker that is none of system, user,
assistant and tool), ``nothing_asked`` (an answer that follows no turn), ``empty_response``,
``special_token_in_text``, ``too_long`` (or cut: no scored token is left),
``duplicate_conversation`` (a row with these tokens and spans is there),
``token_outside_vocabulary``, ``joined_by_tokenizer``, and what the template would lose or garble:
``unread_tools`` and the like, ``refused_by_template``, ``changed_by_template``,
``not_after_header``, ``prompt_not_kept``, ``empty_reasoning``, ``unclosed_by_template``,
``unmarked_by_template`` (it marks answers, and not as many as there are).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import numpy as np

from schemas.tables.conversations import Conversation
from schemas.tables.documents import SPLITS
from stages.sources.conversations.readers import RawConversation
from stages.sources.conversations.stage import ConversationsStage
from stages.sources.conversations.turns import WordedRow, worded_rows
from stages.sources.dialogues.beside_text import as_read, tools_of
from stages.sources.dialogues.dialogue import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    USER,
    Message,
    UnusableDialogue,
    strings_of,
)
from stages.sources.dialogues.wording import ChatWording, eos_of, part_ids
from stages.sources.reading.cleaning import digest_of, normalise
from stages.sources.reading.rejects import Rejects, UnusableRecord, beginning
from stages.sources.reading.tokens import IdArray, TextTokenizer

TRAIN, HELDOUT = SPLITS
_ROLES = (SYSTEM, USER, ASSISTANT, TOOL)


class ConversationBuilder:
    """Makes rows with one tokenizer, its chat template and a maximum length."""

    def __init__(
        self, stage: ConversationsStage, tokenizer: TextTokenizer, rejects: Rejects
    ) -> None:
        """Raise ConfigError where tokenizer, chat template and length do not go together."""
        tokenizer.require(length=stage.max_length, eos=False, setting="max_length")
        self.stage = stage
        self.tokenizer = tokenizer
        self.rejects = rejects
        self.wording = ChatWording(tokenizer, stage.chat_template_kwargs)

    def build_all(self, conversations: Iterable[RawConversation]) -> list[Conversation]:
        """Return distinct rows; what cannot be one is counted by its reason and listed."""
        rows: dict[str, Conversation] = {}
        places: dict[str, str] = {}
        for conversation in conversations:
            with self.rejects.passing(conversation.place):
                built = self._built(conversation)
                twice = [row.sample_id for row in built if row.sample_id in rows]
                for row in built:
                    if row.sample_id not in rows:
                        rows[row.sample_id], places[row.sample_id] = row, conversation.place
                        self.rejects.counts["cut_to_length"] += row.is_cut
                if twice:
                    first = f"sample {twice[0]} is that of {places[twice[0]]}"
                    raise UnusableRecord("duplicate_conversation", first)
        return list(rows.values())

    def _built(self, conversation: RawConversation) -> list[Conversation]:
        try:
            return list(self.build(conversation))
        except UnusableDialogue as error:
            opening = beginning(conversation.messages[0].words)
            what = f"the conversation that opens with {opening}"
            raise UnusableRecord(error.reason, what) from error

    def build(self, conversation: RawConversation) -> Iterator[Conversation]:
        """Yield the rows; raises UnusableDialogue with the reason why there is none."""
        tools = tools_of(conversation.tools)
        reads = partial(self.wording.reads, with_tools=bool(tools))
        messages = conversation.messages
        if self.stage.turns == "none":
            messages = _asked(messages)
        said = tuple(as_read(message, reads) for message in messages)
        self._require_usable(said, conversation.tools)
        split = self._split(said)
        for worded in worded_rows(self.wording, said, tools, self.stage.turns):
            yield self._row(worded, split)

    def _require_usable(self, said: tuple[Message, ...], tools: object) -> None:
        answers = [message for message in said if message.role == ASSISTANT]
        strings = [text for message in said for text in message.strings]
        checks = {
            "bad_roles": any(message.role not in _ROLES for message in said),
            "no_assistant_turn": not answers and self.stage.turns != "none",
            "nothing_asked": not said or said[0].role == ASSISTANT,
            "empty_response": any(map(_is_empty, answers)),
            "special_token_in_text": any(
                map(self.wording.marks.search, (*strings, *strings_of(tools)))
            ),
        }
        for reason, is_so in checks.items():
            if is_so:
                raise UnusableDialogue(reason)

    def _row(self, worded: WordedRow, split: str) -> Conversation:
        """Return a row whose parts are tokenised apart; raises UnusableDialogue."""
        parts: list[IdArray] = []
        scored: list[bool] = []
        for text, is_scored in _parts(worded):
            parts.append(part_ids(self.tokenizer, text) if parts else self._first_ids(text))
            scored.append(is_scored)
        if worded.spans and not self.wording.closes:
            parts[-1] = np.append(parts[-1], eos_of(self.tokenizer))
        ids_T = np.concatenate(parts)
        if int(ids_T.max()) >= self.tokenizer.vocab_size:
            raise UnusableDialogue("token_outside_vocabulary")
        limit = self.stage.max_length
        may_cut = worded.spans and self.stage.long_conversations == "truncate"
        if len(ids_T) > limit and not may_cut:
            raise UnusableDialogue("too_long")
        ends = pairwise(accumulate(map(len, parts), initial=0))
        spans = [
            (max(start, 1), min(end, limit))  # nothing stands before the first token
            for (start, end), is_scored in zip(ends, scored, strict=True)
            if is_scored and max(start, 1) < min(end, limit)
        ]
        if worded.spans and not spans:
            raise UnusableDialogue("too_long" if len(ids_T) > limit else "nothing_asked")
        row = Conversation(
            sample_id="",
            split=split,
            source_id="",
            input_ids_T=ids_T[:limit],
            scored_S2=np.array(spans, np.int32).reshape(-1, 2),
            is_cut=len(ids_T) > limit,
        )
        return replace(row, sample_id=row.hashed_id)

    def _first_ids(self, text: str) -> IdArray:
        """Return the ids of a row's beginning: the template has written any BOS."""
        return self.tokenizer.encode([text])[0]

    def _split(self, said: tuple[Message, ...]) -> str:
        """Return the side of a conversation: that of what was asked first, but for its layout.

        So conversations that open alike, and the rows of one, are all on one side. The system's
        message is no part of it where a user speaks: many conversations share one.
        """
        opening = [message for message in said if message.role != SYSTEM][:1] or said[:1]
        text = "\n".join(message.words for message in opening)
        key = int(digest_of(normalise(text).casefold())[16:], 16)
        return HELDOUT if key < int(self.stage.heldout_fraction * 2**64) else TRAIN


def _parts(worded: WordedRow) -> Iterator[tuple[str, bool]]:
    """Yield the text in parts that are scored or not; what is empty is left out."""
    marks = [0, *(mark for span in worded.spans for mark in span), len(worded.text)]
    for number, (start, end) in enumerate(pairwise(marks)):
        if start < end:
            yield worded.text[start:end], number % 2 == 1


def _asked(said: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages without answers at the end."""
    while said and said[-1].role == ASSISTANT:
        said = said[:-1]
    return said


def _is_empty(message: Message) -> bool:
    return not message.words.strip() and not message.more.get("tool_calls")
