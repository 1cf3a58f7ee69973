"""Which demonstrations a query gets: drawn by hashes of seed, task and content alone.

So draws depend on neither the order of files nor the machine, and another task changes none of
them. In an episode all demonstrations and the query have one wording (LAMA's template).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from schemas.errors import ConfigError
from schemas.tables.documents import SPLITS
from stages.sources.episodes.split import TaskSplit
from stages.sources.episodes.stage import EpisodesStage
from stages.sources.reading.cleaning import digest_of
from stages.sources.tasks.task import Example, Task

TRAIN, HELDOUT = SPLITS


@dataclass(frozen=True, slots=True)
class DrawnEpisode:
    """What an episode is made of, before it is text; ``draw`` counts the draws for one query."""

    split: str
    task: Task
    demonstrations: tuple[Example, ...]
    query: Example
    wording: int
    draw: int


def draw_episodes(
    stage: EpisodesStage, splits: Sequence[TaskSplit], counts: Counter[str]
) -> Iterator[DrawnEpisode]:
    """Yield all episodes, training ones first.

    Raises ConfigError for a task with too few examples, and counts those that ``partition`` leaves.
    """
    for split in splits:
        if split.train and stage.draw == "partition":
            yield from _partition(stage, split, counts)
        elif split.train:
            yield from _resample(stage, split.task, split.train, split.train, TRAIN)
        elif not split.support:
            raise _too_few(split.task, 0, stage.demonstration_range[0] + 1)
    for split in splits:
        yield from _resample(stage, split.task, split.support, split.queries, HELDOUT)


def _partition(
    stage: EpisodesStage, split: TaskSplit, counts: Counter[str]
) -> Iterator[DrawnEpisode]:
    """Cut the examples, shuffled by now, into groups of k demonstrations and a query."""
    fewest, most = stage.demonstration_range
    left, task = split.train, split.task
    if len(left) <= fewest:
        raise _too_few(task, len(left), fewest + 1)
    while len(left) > fewest:
        key = digest_of("group", stage.seed, task.name, left[0].content)
        size = min(fewest + _below(most - fewest + 1, key, "k"), len(left) - 1)
        *demonstrations, query = left[: size + 1]
        wording = _below(len(query.inputs), key, "wording")
        yield DrawnEpisode(TRAIN, task, tuple(demonstrations), query, wording, 0)
        left = left[size + 1 :]
    counts["partition_remainder"] += len(left)


def _resample(
    stage: EpisodesStage,
    task: Task,
    pool: Sequence[Example],
    queries: Sequence[Example],
    split: str,
) -> Iterator[DrawnEpisode]:
    """Give each query ``draws`` draws of demonstrations from the rest of the pool."""
    fewest, most = stage.demonstration_range
    for query in queries:
        others = [
            example
            for example in pool
            if example is not query
            and not (stage.distinct_labels and example.output == query.output)
        ]
        if len(others) < most:
            raise _too_few(task, len(others), most, query if stage.distinct_labels else None)
        for draw in range(stage.draws):
            key = digest_of("draw", stage.seed, task.name, split, query.content, draw)
            size = fewest + _below(most - fewest + 1, key, "k")
            chosen = tuple(others[index] for index in _sample(len(others), size, key))
            wording = _below(len(query.inputs), key, "wording")
            yield DrawnEpisode(split, task, chosen, query, wording, draw)


def _sample(count: int, size: int, key: str) -> list[int]:
    """Return ``size`` distinct numbers below ``count``: the start of a Fisher-Yates shuffle."""
    moved: dict[int, int] = {}
    chosen = []
    for place in range(size):
        other = place + _below(count - place, key, place)
        chosen.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return chosen


def _below(limit: int, *key: object) -> int:
    """Return a number below ``limit``, as good as uniform: 128 bits are far more than it has."""
    return int(digest_of(*key), 16) % limit


def _too_few(task: Task, found: int, needed: int, query: Example | None = None) -> ConfigError:
    which = f" whose label is not '{query.output}' (query at {query.place})" if query else ""
    return ConfigError(
        f"task '{task.name}': found {found} examples to draw from{which}, needed {needed}: give it "
        f"more, or lower demonstrations"
    )
