"""How well a frozen reader answers after a distiller's vectors, and after what stands beside them.

Beside each distiller stand what a reader says of the same queries after nothing (``zero-shot``),
after as many random rows of its own vocabulary (``random vectors``) and after the demonstrations
that the teacher reads, as text (``all demonstrations``; a reader that is the teacher has a KL of 0
there, so none is given). Free answers are left out and counted.

Dimensions: B = rows, L = tokens of demonstrations, M = vectors, N = candidates, Q = tokens of a
query with a candidate, R = the reader's width.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError
from schemas.storage.files import Folder
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.episodes import split_candidates
from stages.models.causal_lm.model import check_student, student_head, student_vocab_size
from stages.models.encoder_decoder.model import padded
from stages.student.batches.demonstrations import check_rooms
from stages.student.distiller.distiller import Distiller, load_distiller
from stages.student.distiller.reader import answer_states, check_reader, load_reader
from stages.student.evaluate.icl import IclReport, TaskReport
from stages.student.evaluate.icl_metrics import CandidateScoring, candidate_scores
from stages.student.evaluate.icl_tasks import STUDENT, accuracy_by_draw, choice_numbers, make_choice
from stages.student.evaluate.positions import device_of, held_out_of, measure_student
from stages.student.options import TrainOptions

ZERO_SHOT, RANDOM, ALL = "zero-shot", "random vectors", "all demonstrations"
CANDIDATES_AT_A_TIME = 64

Row = Mapping[str, Any]


class FixedVectors(nn.Module):
    """The same vectors [M, R] before every query, whatever is demonstrated; M may be 0."""

    def __init__(self, vectors_MR: Tensor) -> None:
        """Hold them."""
        super().__init__()
        self.vectors_MR = vectors_MR

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.vectors_MR.device

    def forward(self, input_ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return [B, M, R]."""
        return self.vectors_MR.expand(len(lengths_B), -1, -1)


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

    Reports are by the distillers' names, then by those of the module. Raises ConfigError for
    another table, and what training would raise for models that do not fit.
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
    made: dict[str, Any] = {}
    for name, folder in distillers.items():
        distiller = load_distiller(folder, device=device)
        check_student(folder, dataset, distiller.vocab_size)
        check_reader(distiller, reader, reader_folder)
        check_rooms(distiller, reader, dataset)
        made[name] = distiller
    made |= _beside(reader, next(iter(made.values())), held_out.num_token_ids)
    reports = {}
    for name, model in made.items():
        answered = _answered(dataset, reader, _shown_by(model), scoring)
        reports[name] = replace(answered, positions=measure_student(model, held_out))
    embed = reader.get_input_embeddings()
    whole = lambda row: embed(_ids(row["input_ids_T"][: row["query_start"]], device))  # noqa: E731
    return reports | {ALL: _answered(dataset, reader, whole, scoring)}


def _beside(
    reader: PreTrainedModel, distiller: Distiller, num_token_ids: int | None
) -> dict[str, FixedVectors]:
    """Return no vectors, and as many of the vocabulary's rows as the distiller makes."""
    rows_VR = reader.get_input_embeddings().weight.detach()[:num_token_ids]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(rows_VR), generator=generator)[: distiller.config.num_vectors]
    chosen_MR = rows_VR[drawn.to(rows_VR.device)]
    return {ZERO_SHOT: FixedVectors(rows_VR[:0]), RANDOM: FixedVectors(chosen_MR)}


def _shown_by(model: Any) -> Callable[[Row], Tensor]:
    """Return what gives the vectors [M, R] of a row."""

    def shown(row: Row) -> Tensor:
        ids_L = _ids(row["distiller_ids_L"], model.device)
        vectors_BMR: Tensor = model(ids_L[None], torch.tensor([len(ids_L)]))
        return vectors_BMR[0]

    return shown


def _ids(ids: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(ids, np.int64)).to(device)


@torch.inference_mode()
def _answered(
    dataset: CachedDataset,
    reader: PreTrainedModel,
    shown: Callable[[Row], Tensor],
    scoring: CandidateScoring,
) -> IclReport:
    """Answer every row that has candidates by the one of the best score."""
    tasks: dict[str, list[Any]] = defaultdict(list)
    kinds: dict[str, str] = {}
    num_left_out = 0
    for row in (dataset[index] for index in range(len(dataset))):
        if row["gold"] < 0:
            num_left_out += bool(row["task"])
            continue
        sums_N = candidate_sums(reader, shown(row), row)
        scores_N = candidate_scores(sums_N, row["candidate_lengths_N"], scoring)
        tasks[row["task"]].append(make_choice(row, {STUDENT: scores_N}))
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
    return IclReport(tuple(found), scoring, dataset.num_missing, num_left_out)


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
