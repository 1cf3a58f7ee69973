"""How well a frozen reader answers after a distiller's vectors, and after what stands beside them.

What stands beside them is in ``before_query``. A row that the reader has no room for, with what is
given before its query and the longest of its answers, is left out for that one alone and counted;
``positions_before_query`` is the mean over the others. Free answers are left out and counted.

Dimensions: M = positions before a query, N = candidates, Q = tokens of a query with a candidate,
R = the reader's width.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError
from schemas.storage.files import Folder
from schemas.storage.manifest import read_manifest
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.episodes import split_candidates
from stages.models.causal_lm.model import check_student, student_head, student_vocab_size
from stages.models.encoder_decoder.halves import frame_of
from stages.models.encoder_decoder.model import padded
from stages.models.spec import is_one_model
from stages.student.batches.demonstrations import asked_length, check_rooms
from stages.student.distiller.distiller import load_distiller
from stages.student.distiller.reader import answer_states, check_reader, load_reader, window_of
from stages.student.evaluate.before_query import Given, beside_distillers
from stages.student.evaluate.icl import IclReport, TaskReport
from stages.student.evaluate.icl_metrics import CandidateScoring, candidate_scores
from stages.student.evaluate.icl_rows import EpisodeRow, episode_row
from stages.student.evaluate.icl_tasks import (
    STUDENT,
    Numbers,
    accuracy_by_draw,
    choice_numbers,
    make_choice,
)
from stages.student.evaluate.positions import HeldOut, device_of, held_out_of, measure_student
from stages.student.evaluate.stage import BEYOND_WINDOW, FEWER, POSITIONS, WITHOUT_SHOTS
from stages.student.options import TrainOptions

CANDIDATES_AT_A_TIME = 64

Row = Mapping[str, Any]


def evaluate_vectors(
    distillers: Mapping[str, Path],
    reader_folder: Path,
    data: Sequence[Folder],
    *,
    split: str = "heldout",
    scoring: CandidateScoring = "mean",
    options: TrainOptions | None = None,
) -> dict[str, IclReport]:
    """Measure distillers, and what stands beside them, on ``demonstrations`` and their signals.

    Reports are by the distillers' names, then by those of ``before_query``, which are given as many
    positions as the first distiller makes vectors. Raises ConfigError for another table, and what
    training would raise for models that do not fit.
    """
    options = options or TrainOptions()
    device = device_of(options)
    dataset = open_dataset(data, split=split, verify=options.verify)
    if dataset.manifests[0].table != DEMONSTRATIONS.name:
        raise ConfigError(
            f"{dataset.folders[0]} is table {dataset.manifests[0].table}, expected "
            f"{DEMONSTRATIONS.name} first: a reader reads vectors before the queries of that table"
        )
    reader = load_reader(reader_folder, device=device, dtype=torch.float32)
    check_student(reader_folder, dataset, student_vocab_size(reader))
    held_out = held_out_of(dataset, reader_folder, device, options, "float32")
    held_out = replace(held_out, reader=reader)
    given: dict[str, Given] = {}
    for name, folder in distillers.items():
        distiller = load_distiller(folder, device=device)
        check_student(folder, dataset, distiller.vocab_size)
        check_reader(distiller, reader, reader_folder)
        check_rooms(distiller, reader, dataset)
        given[name] = Given(distiller, distiller.config.num_vectors)
    num_vectors = next(iter(given.values())).num_vectors
    assert num_vectors is not None
    given |= beside_distillers(reader, num_vectors, held_out.num_token_ids)
    return {name: _report(name, one, held_out, scoring) for name, one in given.items()}


def is_cross_model(reader: Mapping[str, Any], tables: Sequence[Folder]) -> bool:
    """Whether the reader of this identity is another model than the cached teacher."""
    made_by = [model for table in tables for model in read_manifest(table).identity["models"]]
    return any(not is_one_model(model, reader) for model in made_by)


def _report(name: str, given: Given, held_out: HeldOut, scoring: CandidateScoring) -> IclReport:
    """Measure the rows that the reader has room for: at scored positions, then candidates."""
    dataset, reader = held_out.dataset, held_out.reader
    assert reader is not None
    window, frame, rows, read = window_of(reader), frame_of(reader.config), [], []
    for index in range(len(dataset)):
        row = dataset[index]
        num_positions = given.num_positions(row)
        answers = len(row["input_ids_T"]) - row["answer_start"], *row["candidate_lengths_N"]
        asked = asked_length(row, frame, int(max(answers)))
        if window is None or num_positions + asked <= window:
            rows.append(index)
            read.append(num_positions)
    counts: Numbers = {}
    if len(rows) < len(dataset):
        counts[BEYOND_WINDOW] = float(len(dataset) - len(rows))
    if name == FEWER and 0 in read:
        counts[WITHOUT_SHOTS] = float(read.count(0))
    answered = _answered(dataset, rows, reader, given, scoring)
    if not rows:
        return replace(answered, positions=counts)
    options = held_out.options
    if given.num_vectors is None:  # rows of unlike lengths are read one at a time
        options = replace(options, eval_batch_size=1)
    mine = replace(held_out, rows=rows, tokens_of=given.tokens_of, options=options)
    measured = measure_student(given.model, mine)
    return replace(answered, positions={POSITIONS: float(np.mean(read)), **measured, **counts})


@torch.inference_mode()
def _answered(
    dataset: CachedDataset,
    rows: Sequence[int],
    reader: PreTrainedModel,
    given: Given,
    scoring: CandidateScoring,
) -> IclReport:
    """Answer each of ``rows`` that has candidates by the one of the best score."""
    tasks: dict[str, list[Any]] = defaultdict(list)
    kinds: dict[str, str] = {}
    found_rows: list[EpisodeRow] = []
    num_left_out = 0
    for row in (dataset[index] for index in rows):
        if row["gold"] < 0:
            num_left_out += bool(row["task"])
            continue
        sums_N = candidate_sums(reader, given.before(row), row)
        scores_N = candidate_scores(sums_N, row["candidate_lengths_N"], scoring)
        choice = make_choice(row, {STUDENT: scores_N})
        tasks[row["task"]].append(choice)
        found_rows.append(episode_row(row, choice))
        kinds[row["task"]] = row["kind"]
    found = [
        TaskReport(
            task=task,
            kind=kinds[task],
            num_episodes=len(choices),
            num_queries=len({choice.query_id for choice in choices}),
            num_draws=len({choice.draw for choice in choices}),
            numbers=choice_numbers(choices),
            accuracy_by_draw=accuracy_by_draw(choices),
        )
        for task, choices in sorted(tasks.items())
    ]
    return IclReport(
        tuple(found), scoring, dataset.num_missing, num_left_out, rows=tuple(found_rows)
    )


def candidate_sums(reader: PreTrainedModel, vectors_MR: Tensor, row: Row) -> Any:
    """Return [N] sums of log p of each candidate's tokens, after vectors and query; float64."""
    query = row["input_ids_T"][row["query_start"] : row["answer_start"]].tolist()
    candidates = split_candidates(row["candidate_ids_C"], row["candidate_lengths_N"])
    head, sums = student_head(reader), []
    for start in range(0, len(candidates), CANDIDATES_AT_A_TIME):
        part = [ids.astype(np.int64) for ids in candidates[start : start + CANDIDATES_AT_A_TIME]]
        ids_NA = padded(part)[0].to(vectors_MR.device)
        hidden_NAR = answer_states(reader, vectors_MR, query, ids_NA)
        logprobs_NAV = head.logits(hidden_NAR).float().log_softmax(-1)
        own_NA = logprobs_NAV.gather(2, ids_NA[:, :, None])[:, :, 0].double()
        sums += [float(own_A[: len(ids)].sum()) for own_A, ids in zip(own_NA, part, strict=True)]
    return np.array(sums)
