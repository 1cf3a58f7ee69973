"""Conversations to finished rows in one working folder: read, check, tokenise, write.

Everything is in memory: 4 bytes a token, and a few hundred bytes a row. Rows lie in the order of
their ``sample_id``, a hash, so within a split they are a fixed shuffle, and the first ones are a
sample of all. The order of the source's files and rows decides nothing.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from schemas.tables.conversations import CONVERSATIONS, Conversation
from stages.sources.conversations.building import ConversationBuilder
from stages.sources.conversations.readers import read_conversations
from stages.sources.conversations.stage import ConversationsStage
from stages.sources.dialogues.wording import prompt_not_kept
from stages.sources.prepared import PreparedShards
from stages.sources.prepared_rows import PreparedRows, prepare_rows, require_splits, sampled
from stages.sources.reading.rejects import Rejects
from stages.sources.reading.tokens import TextTokenizer
from stages.stage import OnProgress


def prepare(stage: ConversationsStage, work_dir: Path, on_progress: OnProgress) -> PreparedShards:
    """Return the shards, made before or now; rows are held in memory.

    Raises ConfigError where every record is malformed or a split has no row, RejectLimitError where
    too many records are malformed.
    """
    return prepare_rows(CONVERSATIONS, stage, work_dir, lambda t: _make(stage, t, on_progress))


def read(work_dir: Path, index: int) -> Iterator[Conversation]:
    """Yield the rows of one shard, in order; raises StoreError where nothing is prepared."""
    yield from PreparedRows(CONVERSATIONS, work_dir).read(index)


def _make(
    stage: ConversationsStage, tokenizer: TextTokenizer, on_progress: OnProgress
) -> tuple[list[Conversation], PreparedShards]:
    read = Rejects()
    builder = ConversationBuilder(stage, tokenizer, read)
    found = builder.build_all(read_conversations(stage.source, read))
    read.require_within(stage.max_rejected_fraction)
    on_progress(f"{len(found):,} rows of conversations")
    advice = _advice(stage, read.counts)
    heldout = stage.heldout_fraction > 0
    require_splits(found, read, heldout=heldout, what="conversations", advice=advice)
    return sampled(found, read, rows_per_shard=stage.rows_per_shard, max_rows=stage.max_rows)


def _advice(stage: ConversationsStage, counts: Counter[str]) -> str:
    """Return what may keep rows, by what most of them were rejected for."""
    reason = max(counts, key=lambda why: counts[why], default="")
    if reason == "prompt_not_kept":
        return prompt_not_kept(stage.tokenizer)
    if reason in ("not_after_header", "empty_reasoning"):
        return (
            f"the chat template in {stage.tokenizer} opens an answer with what these answers do "
            f"not hold (a thought, say): give chat_template_kwargs (such as enable_thinking: "
            f"false) with which the answer follows its header, or save another chat_template.jinja"
        )
    if reason == "too_long":
        or_cut = ", or use long_conversations: truncate"
        or_cut = "" if stage.long_conversations == "truncate" else or_cut
        return f"raise max_length ({stage.max_length}){or_cut}"
    return (
        f"give more conversations, or change max_length or heldout_fraction "
        f"({stage.heldout_fraction})"
    )
