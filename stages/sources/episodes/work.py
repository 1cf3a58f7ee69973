"""Tasks to finished episodes in one working folder: read, split, draw, tokenise, write.

Everything is in memory: a task is tens to thousands of short examples. Rows lie in the order of
their ``sample_id``, a hash, so within a split they are a fixed shuffle of all tasks. The file that
lists the shards is written last; where it speaks of the same configuration, files and tokenizer,
there is nothing to do.

Cost: 5,526 episodes of 8 demonstrations (1.6 M tokens) took 5 CPU seconds (one core, 2026-11).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from schemas.errors import ConfigError
from schemas.tables.documents import SPLITS
from schemas.tables.episodes import EPISODES, Episode
from stages.sources.episodes.building import EpisodeBuilder
from stages.sources.episodes.draws import draw_episodes
from stages.sources.episodes.split import split_tasks
from stages.sources.episodes.stage import EpisodesStage
from stages.sources.episodes.templates import template_of
from stages.sources.prepared import PreparedShards, cut_shards
from stages.sources.prepared_rows import PreparedRows, prepare_rows
from stages.sources.reading.control_tokens import REJECTED, ControlTokenRule
from stages.sources.reading.rejects import Rejects, UnusableRecord, beginning
from stages.sources.reading.tokens import TextTokenizer
from stages.sources.tasks.readers import read_tasks
from stages.sources.tasks.task import Task
from stages.stage import OnProgress


def prepare(stage: EpisodesStage, work_dir: Path, on_progress: OnProgress) -> PreparedShards:
    """Return the shards, made before or now; tasks are held in memory.

    Raises ConfigError for a source of which every record is malformed, a task with too few examples
    or where no row can be made, RejectLimitError where too many records are malformed.
    """
    return prepare_rows(EPISODES, stage, work_dir, lambda t: _make(stage, t, on_progress))


def read(work_dir: Path, index: int) -> Iterator[Episode]:
    """Yield the rows of one shard, in order; raises StoreError where nothing is prepared."""
    yield from PreparedRows(EPISODES, work_dir).read(index)


def _make(
    stage: EpisodesStage, tokenizer: TextTokenizer, on_progress: OnProgress
) -> tuple[list[Episode], PreparedShards]:
    read = Rejects()
    counts = read.counts
    template = template_of(stage.template)
    builder = EpisodeBuilder(tokenizer, template, stage.max_length, read)
    tasks = read_tasks(stage.sources, read)
    read.require_within(stage.max_rejected_fraction)
    tasks = _without_rejected(tasks, _rule_of(stage, tokenizer), read)
    on_progress(f"{len(tasks)} tasks, {sum(len(task.examples) for task in tasks):,} examples")
    splits = split_tasks(stage, tasks, counts)
    episodes = builder.build_all(draw_episodes(stage, splits, counts))
    if not episodes:
        reasons = ", ".join(f"{why} {count}" for why, count in sorted(counts.items()) if count)
        raise ConfigError(
            f"no episode could be made of {len(tasks)} tasks ({reasons or 'nothing was left out'});"
            f" raise max_length or lower demonstrations"
        )
    on_progress(f"{len(episodes):,} episodes")
    by_split = {split: [row for row in episodes if row.split == split] for split in SPLITS}
    rows = [row for split in SPLITS for row in sorted(by_split[split], key=lambda r: r.sample_id)]
    shards = cut_shards({split: len(by_split[split]) for split in SPLITS}, stage.rows_per_shard)
    rejects = {why: count for why, count in sorted(counts.items()) if count}
    return rows, PreparedShards(shards=shards, rejects=rejects, rejected=tuple(read.listed))


def _rule_of(stage: EpisodesStage, tokenizer: TextTokenizer) -> ControlTokenRule:
    """Return what is done with special tokens; a template's own ones cannot be split."""
    rule = ControlTokenRule(tokenizer, stage.control_tokens)
    template = template_of(stage.template)
    if stage.control_tokens == "split" and rule.outcome(
        (template.demonstration, template.separator)
    ):
        raise ConfigError(
            "control_tokens: split would split those of the template too: take them out of it, or "
            "use control_tokens: reject"
        )
    return rule


def _without_rejected(
    tasks: Sequence[Task], rule: ControlTokenRule, rejects: Rejects
) -> list[Task]:
    """Return the tasks with the examples that may be used; all that spell such tokens count."""
    found = []
    for task in tasks:
        kept = []
        for example in task.examples:
            outcome = rule.outcome((*example.inputs, example.output, *task.options_of(example)))
            with rejects.passing(example.place):
                if outcome == REJECTED:
                    raise UnusableRecord(REJECTED, f"in {beginning(example.inputs[0])}")
                kept.append(example)
                rejects.counts.update([outcome] if outcome else [])
        found.append(replace(task, examples=tuple(kept)))
    return found
