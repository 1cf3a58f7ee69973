"""How well a student answers held-out few-shot episodes, and how much like the teacher.

Episodes with candidates are answered by the candidate of the best score, free ones by greedy
decoding. What is measured is in ``icl_tasks``; a number over all tasks is the mean of the tasks'
(a macro average), whatever their sizes. With ``candidate_scores`` or ``subset_preferences`` among
the joined tables the teacher stands beside the student; no teacher is loaded.

One process does it: in a distributed run call it on rank 0 alone.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError
from schemas.storage.files import Folder
from schemas.tables.episodes import EPISODES
from stages.models.causal_lm.model import check_student, load_student, student_vocab_size
from stages.student.batches.signals import encoding_of
from stages.student.evaluate.free_answers import FreeAnswer, generate_answers
from stages.student.evaluate.icl_metrics import CandidateScoring, candidate_scores, mean_and_spread
from stages.student.evaluate.icl_rows import EpisodeRow, episode_row
from stages.student.evaluate.icl_scoring import candidate_sums, subset_sums
from stages.student.evaluate.icl_tasks import (
    STUDENT,
    TEACHER,
    Choice,
    Numbers,
    accuracy_by_draw,
    choice_numbers,
    generation_numbers,
    make_choice,
    subset_numbers,
)
from stages.student.evaluate.positions import (
    DTYPES,
    DtypeName,
    device_of,
    held_out_of,
    measure_student,
)
from stages.student.options import TrainOptions

_COLUMNS = (
    *("sample_id", "task", "kind", "query_id", "draw", "input_ids_T", "demonstrations_M3"),
    *("query_start", "answer_start", "candidate_ids_C", "candidate_lengths_N", "gold"),
    *("candidate_logprobs_N", "subset_demonstrations_S", "subset_sizes_N", "ranks_N"),
    "num_answer_tokens",
)

Array = npt.NDArray[Any]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class IclOptions:
    """How episodes are answered. Free answers need ``tokenizer``, a model folder; without it they
    are left out and counted. ``batch_size`` is that of decoding.
    """

    scoring: CandidateScoring = "mean"
    dtype: DtypeName = "float32"
    batch_size: int = 8
    tokenizer: Path | None = None


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One task; ``numbers`` has the names that ``icl_tasks`` lists."""

    task: str
    kind: str
    num_episodes: int
    num_queries: int
    num_draws: int
    numbers: Numbers
    accuracy_by_draw: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IclReport:
    """All tasks in the order of their names.

    ``num_missing`` rows lacked a partner in some table, ``num_left_out`` free answers a tokenizer.
    ``positions`` is ``measure_student``'s. ``rows`` has each episode's own results (``icl_rows``),
    in the order of the tasks.
    """

    tasks: tuple[TaskReport, ...]
    scoring: CandidateScoring
    num_missing: int
    num_left_out: int
    positions: Numbers = field(default_factory=dict)
    rows: tuple[EpisodeRow, ...] = ()

    def summary(self) -> dict[str, float]:
        """Return the numbers over all tasks, for a trainer's metrics.

        Each is the mean of the tasks that have it, so ``accuracy`` and ``vote_accuracy`` (or
        ``precision_at_10``) are of the same tasks only where all have several draws.
        """
        names = dict.fromkeys(name for task in self.tasks for name in task.numbers)
        numbers = {
            name: float(np.mean([t.numbers[name] for t in self.tasks if name in t.numbers]))
            for name in names
            if not name.endswith("_deviation")
        }
        by_draw = [task.accuracy_by_draw for task in self.tasks if task.accuracy_by_draw]
        draws = set.intersection(*map(set, by_draw)) if by_draw else set()
        if len(draws) > 1:
            means = [float(np.mean([found[draw] for found in by_draw])) for draw in sorted(draws)]
            numbers["accuracy_deviation"] = mean_and_spread(means).deviation or 0.0
        counts = {"num_tasks": len(self.tasks), "num_episodes": self.num_episodes}
        return {**counts, **numbers, **self.positions}

    @property
    def num_episodes(self) -> int:
        """Episodes measured."""
        return sum(task.num_episodes for task in self.tasks)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it but the rows as plain JSON values."""
        body = asdict(replace(self, rows=()))
        del body["rows"]
        return {**body, "overall": self.summary()}


def evaluate_episodes(
    student: Path,
    data: Sequence[Folder],
    *,
    split: str = "heldout",
    scoring: CandidateScoring = "mean",
    batch_size: int = 8,
    dtype: DtypeName = "float32",
    options: TrainOptions | None = None,
) -> IclReport:
    """Load a student and measure it on one split; ``data`` is episodes, then tables about them.

    With ``teacher_logits`` among them, KL and agreement at every scored position come too.
    """
    options = replace(options or TrainOptions(), eval_batch_size=batch_size)
    device = device_of(options)
    dataset = open_dataset(data, split=split, verify=options.verify)
    model = load_student(student, device=device)
    check_student(student, dataset, student_vocab_size(model))
    settings = IclOptions(scoring=scoring, dtype=dtype, batch_size=batch_size, tokenizer=student)
    report = measure_episodes(model, dataset, settings)
    if not encoding_of(dataset):
        return report
    held_out = held_out_of(dataset, student, device, options, dtype)
    return replace(report, positions=measure_student(model, held_out))


def measure_episodes(
    model: PreTrainedModel, dataset: CachedDataset, options: IclOptions | None = None
) -> IclReport:
    """Answer every row and compare; ``dataset`` is episodes joined with tables about them.

    Rows are all held in memory, their teacher distributions are not. Raises ConfigError where the
    first table is no ``episodes``, StoreError where draws of one query do not belong together.
    """
    options = options or IclOptions()
    if dataset.manifests[0].table != EPISODES.name:
        raise ConfigError(
            f"{dataset.folders[0]} is table {dataset.manifests[0].table}, expected episodes first"
        )
    rows = [_light(dataset[index]) for index in range(len(dataset))]
    answered = _Answered()
    training, dtype = model.training, DTYPES[options.dtype]
    model.eval()
    autocast = torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), autocast:
        answered.score(model, rows, options)
    model.train(training)
    tasks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if answered.has(row):
            tasks[row["task"]].append(row)
    return IclReport(
        tasks=tuple(answered.report(task, tasks[task]) for task in sorted(tasks)),
        scoring=options.scoring,
        num_missing=dataset.num_missing,
        num_left_out=sum(row["gold"] < 0 for row in rows) - len(answered.answers),
        rows=tuple(answered.row(row) for task in sorted(tasks) for row in tasks[task]),
    )


def _light(row: Row) -> Row:
    return {name: row[name] for name in _COLUMNS if name in row}


@dataclass(frozen=True, slots=True)
class _Answered:
    """What the student said to each episode, by sample_id."""

    choices: dict[str, Choice] = field(default_factory=dict)
    answers: dict[str, FreeAnswer] = field(default_factory=dict)
    subsets: dict[str, Array] = field(default_factory=dict)

    def score(self, model: PreTrainedModel, rows: Sequence[Row], options: IclOptions) -> None:
        """Run the student on all of them."""
        dtype = DTYPES[options.dtype]
        chosen = [row for row in rows if row["gold"] >= 0]
        for row, sums_N in zip(chosen, candidate_sums(model, chosen, dtype=dtype), strict=True):
            self.choices[row["sample_id"]] = make_choice(row, _scores(row, sums_N, options.scoring))
        if "ranks_N" in rows[0]:
            for row, sums_N in zip(rows, subset_sums(model, rows, dtype=dtype), strict=True):
                self.subsets[row["sample_id"]] = sums_N
        free = [row for row in rows if row["gold"] < 0]
        if free and options.tokenizer is not None:
            said = generate_answers(
                model, free, tokenizer_folder=options.tokenizer, batch_size=options.batch_size
            )
            self.answers.update(zip([row["sample_id"] for row in free], said, strict=True))

    def has(self, row: Row) -> bool:
        """Return whether anything was measured on a row."""
        return any(
            row["sample_id"] in found for found in (self.choices, self.answers, self.subsets)
        )

    def row(self, row: Row) -> EpisodeRow:
        """Return what was measured on one row."""
        name = row["sample_id"]
        return episode_row(
            row, self.choices.get(name), self.answers.get(name), self.subsets.get(name)
        )

    def report(self, task: str, rows: Sequence[Row]) -> TaskReport:
        """Put one task's numbers together."""
        numbers: Numbers = {}
        choices = [self.choices[row["sample_id"]] for row in rows if row["gold"] >= 0]
        if choices:
            numbers |= choice_numbers(choices)
        free = [row for row in rows if row["sample_id"] in self.answers]
        if free:
            numbers |= generation_numbers(free, [self.answers[row["sample_id"]] for row in free])
        if self.subsets:
            numbers |= subset_numbers(rows, [self.subsets[row["sample_id"]] for row in rows])
        return TaskReport(
            task=task,
            kind=rows[0]["kind"],
            num_episodes=len(rows),
            num_queries=len({row["query_id"] for row in rows}),
            num_draws=len({row["draw"] for row in rows}),
            numbers=numbers,
            accuracy_by_draw=accuracy_by_draw(choices) if choices else {},
        )


def _scores(row: Row, sums_N: Array, scoring: CandidateScoring) -> dict[str, Array]:
    """Return the scores of the student and, where they are cached, of the teacher."""
    sums = {STUDENT: sums_N}
    if "candidate_logprobs_N" in row:
        sums[TEACHER] = row["candidate_logprobs_N"]
    lengths_N = row["candidate_lengths_N"]
    return {name: candidate_scores(array, lengths_N, scoring) for name, array in sums.items()}
