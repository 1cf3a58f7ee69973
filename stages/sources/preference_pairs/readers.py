"""Records of the three formats -> pairs of dialogues, nothing of them judged yet.

Text is kept as it stands, but for HH-RLHF transcripts, whose spaces around a turn are punctuation.
What else a message holds (tool calls, thoughts) goes with it, and ``tools`` with the row.
"""

import re
from collections.abc import Iterator
from typing import Any

from stages.sources.dialogues.dialogue import ASSISTANT, SYSTEM, USER, Message
from stages.sources.dialogues.messages import (
    SHAREGPT,
    message_of,
    messages_of,
    text_or_messages,
    without_nulls,
)
from stages.sources.preference_pairs.pairs import Branch, RawPair
from stages.sources.preference_pairs.stage import HubPairs, PairColumns, PairFiles
from stages.sources.reading.lines import field_of, shown, text_of
from stages.sources.reading.records import read_records
from stages.sources.reading.rejects import MalformedRecord, Rejects
from stages.sources.reading.source import RowFiles

_TRANSCRIPT_SPEAKERS = {"Human": USER, "Assistant": ASSISTANT}
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_Record = dict[str, Any]


def read_pairs(source: PairFiles | HubPairs, rejects: Rejects) -> Iterator[RawPair]:
    """Yield the pairs in order; a record that lacks or misspells a part goes to ``rejects``."""
    branch_of = {"standard": _standard, "hh_rlhf": _transcript, "sharegpt": _sharegpt}
    read = branch_of[source.format]
    for place, row in read_records(source, rejects):
        is_json = isinstance(source, RowFiles) and source.is_json
        record = row if is_json else without_nulls(row)
        try:
            chosen, rejected = (
                read(source, record, column) for column in (source.chosen, source.rejected)
            )
        except MalformedRecord as error:
            rejects.add(place, error)
        else:
            yield RawPair(place, chosen, rejected, record.get("tools"))


def _standard(source: PairColumns, record: _Record, column: str) -> Branch:
    said = text_or_messages(record, column, ASSISTANT)
    is_whole = said[0].role in (SYSTEM, USER)
    before = () if is_whole else text_or_messages(record, source.prompt, USER)
    return Branch((*before, *said[:-1]), said[-1])


def _transcript(source: PairColumns, record: _Record, column: str) -> Branch:
    text = text_of(record, column)
    before, *pieces = _TURN.split(text.strip())
    if before or not pieces:
        raise MalformedRecord(
            "not_a_transcript",
            f"'{column}' is {shown(text)}, expected a transcript that begins with 'Human:' and "
            f"parts turns by empty lines; or choose another format",
        )
    said = tuple(
        Message(_TRANSCRIPT_SPEAKERS[speaker], words.strip())
        for speaker, words in zip(pieces[::2], pieces[1::2], strict=True)
    )
    return Branch(said[:-1], said[-1])


def _sharegpt(source: PairColumns, record: _Record, column: str) -> Branch:
    said = messages_of(
        field_of(record, "conversations", "a list of messages"), "conversations", SHAREGPT
    )
    response = message_of(field_of(record, column, "a message"), column, SHAREGPT)
    system = text_of(record, "system") if record.get("system") is not None else ""
    before = (Message(SYSTEM, system),) if system else ()
    return Branch((*before, *said), response)
