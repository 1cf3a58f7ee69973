"""Pairs of dialogues -> rows of the ``preference_pairs`` table.

A prompt of more than ``max_prompt_length`` tokens loses whole turns from the front (counted as
``turns_dropped``, in messages): a system message stays, and what is left begins with the user. A
response of more than ``max_response_length`` tokens costs its row, or is cut and then has no token
that closes it (counted as ``responses_truncated``).

Rejected and counted, beside what ``pairs`` finds: ``prompt_too_long`` (its last exchange
alone), ``response_too_long``, ``same_response`` (as token ids), ``duplicate_pair`` (a row with
these very tokens is there), ``token_outside_vocabulary``, ``joined_by_tokenizer`` (the response's
first character with what stands before it), and what the template would lose or garble:

- ``unread_tools``, ``unread_tool_calls``, ``unread_reasoning_content`` and the like, where the chat
  template does not read what the row holds, ``bad_tools``, ``bad_tool_calls``, ``bad_reasoning``
  where they are not what templates read, ``several_messages`` where ``plain`` writes one text;
- ``refused_by_template`` and ``changed_by_template`` (roles or texts that it will not have);
- ``not_after_header``, ``prompt_not_kept``, ``empty_reasoning``, ``unclosed_by_template`` (see
  ``dialogues.wording``).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from schemas.tables.documents import SPLITS
from schemas.tables.preference_pairs import PreferencePair
from stages.sources.dialogues.beside_text import Tools, as_read, tools_of
from stages.sources.dialogues.dialogue import USER, Message, UnusableDialogue, parts_of
from stages.sources.dialogues.wording import ChatWording, PlainWording, Wording
from stages.sources.preference_pairs.pairs import (
    Branch,
    RawPair,
    require_one_speaker,
    require_usable,
)
from stages.sources.preference_pairs.stage import PreferencePairsStage
from stages.sources.reading.cleaning import digest_of, normalise
from stages.sources.reading.rejects import Rejects, UnusableRecord, beginning
from stages.sources.reading.tokens import IdArray, TextTokenizer

TRAIN, HELDOUT = SPLITS


@dataclass(frozen=True, slots=True)
class BuiltPair:
    """A row, and what it lost on the way."""

    row: PreferencePair
    turns_dropped: int
    responses_truncated: int


class PairBuilder:
    """Makes rows with one tokenizer, wording and maximum lengths."""

    def __init__(
        self, stage: PreferencePairsStage, tokenizer: TextTokenizer, rejects: Rejects
    ) -> None:
        """Raise ConfigError where tokenizer, chat template and lengths do not go together."""
        tokenizer.require(
            length=stage.max_prompt_length + stage.max_response_length,
            eos=False,
            setting="max_prompt_length + max_response_length",
        )
        self.stage = stage
        self.tokenizer = tokenizer
        self.rejects = rejects
        self._is_transcript = stage.source.format == "hh_rlhf"
        self.wording: Wording = (
            ChatWording(tokenizer, stage.chat_template_kwargs)
            if stage.template == "chat"
            else PlainWording(tokenizer, is_transcript=self._is_transcript)
        )

    def build_all(self, pairs: Iterable[RawPair]) -> list[PreferencePair]:
        """Return distinct rows; what cannot be one is counted by its reason and listed."""
        rows: dict[str, PreferencePair] = {}
        places: dict[str, str] = {}
        counts = self.rejects.counts
        for pair in pairs:
            with self.rejects.passing(pair.place):
                built = self._built(pair)
                sample_id = built.row.sample_id
                if sample_id in rows:
                    first = f"sample {sample_id} is that of {places[sample_id]}"
                    raise UnusableRecord("duplicate_pair", first)
                rows[sample_id], places[sample_id] = built.row, pair.place
                counts["turns_dropped"] += built.turns_dropped
                counts["responses_truncated"] += built.responses_truncated
        return list(rows.values())

    def _built(self, pair: RawPair) -> BuiltPair:
        try:
            return self.build(pair)
        except UnusableDialogue as error:
            prompt = pair.chosen.prompt
            asked = f"after {beginning(prompt[-1].words)}" if prompt else "without a prompt"
            raise UnusableRecord(error.reason, f"the pair {asked}") from error

    def build(self, pair: RawPair) -> BuiltPair:
        """Return the row; raises UnusableDialogue with the reason why there is none."""
        tools = tools_of(pair.tools)
        chosen, rejected = self._as_read(pair.chosen, tools), self._as_read(pair.rejected, tools)
        require_usable(RawPair(pair.place, chosen, rejected, tools), self.wording.marks)
        if self._is_transcript:
            require_one_speaker(pair.responses)
        prompt, text, prompt_ids_T = self._fitting(chosen.prompt, tools)
        chosen_ids_C, chosen_finished = self._response(prompt, chosen.response, tools)
        rejected_ids_R, rejected_finished = self._response(prompt, rejected.response, tools)
        if np.array_equal(chosen_ids_C, rejected_ids_R):
            raise UnusableDialogue("same_response")
        parts = (prompt_ids_T, chosen_ids_C, rejected_ids_R)
        if int(np.concatenate(parts).max()) >= self.tokenizer.vocab_size:
            raise UnusableDialogue("token_outside_vocabulary")
        row = PreferencePair(
            sample_id="",
            split=self._split(text),
            prompt_ids_T=prompt_ids_T,
            chosen_ids_C=chosen_ids_C,
            rejected_ids_R=rejected_ids_R,
            chosen_finished=chosen_finished,
            rejected_finished=rejected_finished,
        )
        row = replace(row, sample_id=row.hashed_id)
        dropped = len(pair.chosen.prompt) - len(prompt)
        return BuiltPair(row, dropped, 2 - chosen_finished - rejected_finished)

    def _as_read(self, branch: Branch, tools: Tools) -> Branch:
        """Return a branch with what the wording reads of each message; raises UnusableDialogue."""
        reads = partial(self.wording.reads, with_tools=bool(tools))
        prompt = tuple(as_read(message, reads) for message in branch.prompt)
        return Branch(prompt, as_read(branch.response, reads))

    def _fitting(
        self, prompt: tuple[Message, ...], tools: Tools
    ) -> tuple[tuple[Message, ...], str, IdArray]:
        """Return what is kept of a prompt, as messages, text and ids."""
        system, turns = parts_of(prompt)
        for start in (index for index, turn in enumerate(turns) if turn.role == USER):
            kept = (*system, *turns[start:])
            text = self.wording.prompt_text(kept, tools)
            ids_T = self.wording.prompt_ids(text)
            if len(ids_T) <= self.stage.max_prompt_length:
                return kept, text, ids_T
        raise UnusableDialogue("prompt_too_long")

    def _response(
        self, prompt: tuple[Message, ...], response: Message, tools: Tools
    ) -> tuple[IdArray, bool]:
        """Return the ids of a response, and whether they end it."""
        ids_A = self.wording.response_ids(prompt, response, tools)
        limit = self.stage.max_response_length
        if len(ids_A) <= limit:
            return ids_A, True
        if self.stage.long_responses == "reject":
            raise UnusableDialogue("response_too_long")
        return ids_A[:limit].copy(), False

    def _split(self, text: str) -> str:
        """Return the side of a prompt: that of its text but for case and whitespace.

        The text is the one that is left of an over-long prompt, so rows with equal prompt ids are
        always on one side.
        """
        key = int(digest_of(normalise(text).casefold())[16:], 16)
        return HELDOUT if key < int(self.stage.heldout_fraction * 2**64) else TRAIN
