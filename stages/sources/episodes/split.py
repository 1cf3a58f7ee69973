"""Which examples of each task train, which demonstrate and which ask: nothing is on both sides.

Two examples overlap when any wording of one's input is any of the other's, whatever their case and
spacing. Within one multiple-choice task, where the question may stand in the options ("Which is
true?"), their options or their answers have to be equal too. (A phrase that is part of another's
sentence is not found: keep sets that were cut from one text, such as sst2 and rotten_tomatoes, on
one side.)

1. An example of a training task that overlaps any example of any target is left out.
2. Each task is cut to ``max_examples_per_task``; of a target, the first ``support`` demonstrate.
3. The rest of a target ask, but for those that overlap a demonstration of any target; they are cut
   to ``queries_per_task``.

Samples are the first in the order of a hash of seed, task and content.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from schemas.errors import ConfigError
from stages.sources.episodes.stage import EpisodesStage
from stages.sources.reading.cleaning import digest_of, normalise
from stages.sources.tasks.task import Example, Task

_SCHEMA = {
    "task": pl.String,
    "index": pl.Int64,
    "order": pl.String,
    "inputs": pl.List(pl.String),
    "questions": pl.List(pl.String),
    "target": pl.Boolean,
}


@dataclass(frozen=True, slots=True)
class TaskSplit:
    """One task's examples by role, each in a shuffled order; a target has no ``train`` of its own.

    In the multitask paradigm ``train`` and ``support`` are the same examples.
    """

    task: Task
    train: tuple[Example, ...]
    support: tuple[Example, ...]
    queries: tuple[Example, ...]


def split_tasks(
    stage: EpisodesStage, tasks: Sequence[Task], counts: Counter[str]
) -> list[TaskSplit]:
    """Give every example its role; raises ConfigError for targets that do not fit."""
    _check_targets(stage, tasks)
    examples = _frame(stage, tasks)
    of_targets = examples.filter("target")
    others = _without(examples.filter(~pl.col("target")), of_targets, "inputs")
    counts["overlaps_target"] += examples.height - of_targets.height - others.height
    pool = pl.concat([of_targets, others])
    sampled = _first(pool, stage.max_examples_per_task)
    counts["beyond_max_examples"] += pool.height - sampled.height
    place = pl.int_range(pl.len()).over("task")
    support = sampled.filter(pl.col("target") & (place < stage.support))
    train = sampled.filter(~pl.col("target"))
    asking = sampled.filter(pl.col("target") & (place >= stage.support))
    apart = _without(_without(asking, support, "questions"), support, "inputs", other_tasks=True)
    counts["overlaps_demonstration"] += asking.height - apart.height
    queries = _first(apart, stage.queries_per_task)
    counts["beyond_queries_per_task"] += apart.height - queries.height
    _check_queries(stage, queries)
    train = support if stage.paradigm == "multitask" else train
    return [
        TaskSplit(task, *(_examples(task, frame) for frame in (train, support, queries)))
        for task in tasks
    ]


def _check_targets(stage: EpisodesStage, tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    unknown = [name for name in stage.targets if name not in names]
    if unknown:
        raise ConfigError(
            f"targets: there is no task '{unknown[0]}'; there are: {', '.join(names)}"
        )
    for task in tasks:
        is_target = task.name in stage.targets
        if task.heldout_only and (not is_target or stage.paradigm == "multitask"):
            raise ConfigError(
                f"task '{task.name}' is from BIG-bench, which forbids training on it: name it in "
                f"targets with paradigm meta, or leave it out"
            )
        if stage.paradigm == "multitask" and not is_target:
            raise ConfigError(
                f"task '{task.name}' is not in targets, and paradigm multitask has no other "
                f"tasks: name it there or leave it out"
            )
        if is_target and len(task.examples) <= stage.support:
            raise ConfigError(
                f"target '{task.name}' has {len(task.examples)} examples, expected at least "
                f"{stage.support + 1}: {stage.support} that demonstrate (support) and one that asks"
            )


def _check_queries(stage: EpisodesStage, queries: pl.DataFrame) -> None:
    asked = set(queries["task"])
    for name in stage.targets:
        if name not in asked:
            raise ConfigError(
                f"target '{name}' has no query left: the input of each is also one of the support "
                f"examples; give it more examples"
            )


def _frame(stage: EpisodesStage, tasks: Sequence[Task]) -> pl.DataFrame:
    """Return a row for each example, shuffled within its task, with its inputs as compared."""
    rows = [
        (
            task.name,
            index,
            digest_of("order", stage.seed, task.name, example.content),
            [_compared(text) for text in example.inputs],
            _questions(task, example),
            task.name in stage.targets,
        )
        for task in tasks
        for index, example in enumerate(task.examples)
    ]
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row").sort("task", "order", "index")


def _questions(task: Task, example: Example) -> list[str]:
    """Return what two examples of one task must not share."""
    inputs = [_compared(text) for text in example.inputs]
    if task.kind != "multiple_choice":
        return [digest_of(task.name, text) for text in inputs]
    parts: tuple[object, ...] = (
        sorted(map(_compared, example.options)),
        _compared(example.output),
    )
    return [digest_of(task.name, text, part) for text in inputs for part in parts]


def _compared(text: str) -> str:
    return normalise(text).casefold()


def _without(
    examples: pl.DataFrame, others: pl.DataFrame, column: str, *, other_tasks: bool = False
) -> pl.DataFrame:
    """Return the examples, in order, that share nothing of ``column`` with any of ``others``.

    ``other_tasks`` looks at those of other tasks alone.
    """
    taken = others.select(column, other="task").explode(column).unique()
    shared = examples.explode(column).join(taken, on=column)
    if other_tasks:
        shared = shared.filter(pl.col("task") != pl.col("other"))
    return examples.join(shared, on=["task", "index"], how="anti", maintain_order="left")


def _first(examples: pl.DataFrame, limit: int | None) -> pl.DataFrame:
    """Return the first rows of each task."""
    if limit is None:
        return examples
    return examples.filter(pl.int_range(pl.len()).over("task") < limit)


def _examples(task: Task, frame: pl.DataFrame) -> tuple[Example, ...]:
    return tuple(task.examples[index] for index in frame.filter(task=task.name)["index"])
