"""Preference pairs to finished rows in one working folder: read, check, tokenise, write.

Everything is in memory: 4 bytes a token, and a few hundred bytes a row. Rows lie in the order of
their ``sample_id``, a hash, so within a split they are a fixed shuffle, and the first ones are a
sample of all. The order of the source's files and rows decides nothing.

Cost: 6,000 pairs (5.8 M tokens of SmolLM2's) took 20 CPU seconds and 0.7 GB, most of that the
libraries (one core, 2026-11).
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from stages.sources.dialogues.wording import prompt_not_kept
from stages.sources.preference_pairs.building import PairBuilder
from stages.sources.preference_pairs.readers import read_pairs
from stages.sources.preference_pairs.stage import PreferencePairsStage
from stages.sources.prepared import PreparedShards
from stages.sources.prepared_rows import PreparedRows, prepare_rows, require_splits, sampled
from stages.sources.reading.rejects import Rejects
from stages.sources.reading.tokens import TextTokenizer
from stages.stage import OnProgress


def prepare(stage: PreferencePairsStage, work_dir: Path, on_progress: OnProgress) -> PreparedShards:
    """Return the shards, made before or now; rows are held in memory.

    Raises ConfigError where every record is malformed or a split has no row, RejectLimitError where
    too many records are malformed.
    """
    return prepare_rows(PREFERENCE_PAIRS, stage, work_dir, lambda t: _make(stage, t, on_progress))


def read(work_dir: Path, index: int) -> Iterator[PreferencePair]:
    """Yield the rows of one shard, in order; raises StoreError where nothing is prepared."""
    yield from PreparedRows(PREFERENCE_PAIRS, work_dir).read(index)


def _make(
    stage: PreferencePairsStage, tokenizer: TextTokenizer, on_progress: OnProgress
) -> tuple[list[PreferencePair], PreparedShards]:
    read = Rejects()
    found = PairBuilder(stage, tokenizer, read).build_all(read_pairs(stage.source, read))
    read.require_within(stage.max_rejected_fraction)
    on_progress(f"{len(found):,} preference pairs")
    advice = _advice(stage, read.counts)
    heldout = stage.heldout_fraction > 0
    require_splits(found, read, heldout=heldout, what="preference pairs", advice=advice)
    return sampled(found, read, rows_per_shard=stage.rows_per_shard, max_rows=stage.max_rows)


def _advice(stage: PreferencePairsStage, counts: Counter[str]) -> str:
    """Return what may keep rows, by what most of them were rejected for."""
    reason = max(counts, key=lambda why: counts[why], default="")
    if reason == "prompt_not_kept":
        return prompt_not_kept(stage.tokenizer)
    if reason in ("not_after_header", "empty_reasoning"):
        opens = (
            f"the chat template in {stage.tokenizer} opens an answer with what these responses do "
            f"not hold (a thought, say)"
        )
        if stage.chat_template_kwargs:
            return f"{opens}, with the chat_template_kwargs given too: save another template there"
        return (
            f"{opens}: give chat_template_kwargs (such as enable_thinking: false) with which the "
            f"answer follows its header, or save another chat_template.jinja"
        )
    if reason == "several_messages" or (reason.startswith("unread_") and stage.template == "plain"):
        return "template: plain takes prompts that are one text; use template: chat"
    return (
        f"give more pairs, or change max_prompt_length, max_response_length or heldout_fraction "
        f"({stage.heldout_fraction})"
    )
