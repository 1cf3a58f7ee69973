"""A reader's answers after a distiller's vectors against slow forwards, a token at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.errors import ConfigError
from schemas.tables.episodes import split_candidates
from stages.student.evaluate.vectors import ALL, RANDOM, ZERO_SHOT, evaluate_vectors
from stages.student.options import TrainOptions
from tests.fixtures.demonstration_data import MendData, SlowMend, make_mend_data

OPTIONS = TrainOptions(num_workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MendData:
    return make_mend_data(tmp_path_factory.mktemp("mend"))


@torch.no_grad()
def best_candidate(slow: SlowMend, prefix_PR: Tensor, row: Any) -> int:
    """The candidate of the largest mean log-prob, one forward a token."""
    embed = slow.reader.model.embed_tokens
    query = row.input_ids_T[row.query_start : row.answer_start].tolist()
    scores = []
    for candidate in split_candidates(row.candidate_ids_C, row.candidate_lengths_N):
        total, ids = 0.0, list(query)
        for token in candidate.tolist():
            inputs_TR = torch.cat([prefix_PR, embed(torch.tensor(ids))])
            logits_V = slow.reader(inputs_embeds=inputs_TR[None]).logits[0, -1]
            total += float(logits_V.log_softmax(-1)[token])
            ids.append(token)
        scores.append(total / len(candidate))
    return int(np.argmax(scores))


def test_accuracies_are_those_of_slow_forwards(data: MendData) -> None:
    """On the training split, which has rows enough."""
    tables, models = data.tables("episodes", "exact"), data.models
    found = evaluate_vectors(
        {"distiller": models.distiller}, models.teacher, tables, split="train", options=OPTIONS
    )
    assert list(found) == ["distiller", ZERO_SHOT, RANDOM, ALL]
    slow = SlowMend(models)
    embed = slow.reader.model.embed_tokens
    rows = [row for row in data.rows("episodes").values() if row.split == "train"]
    chosen = [row for row in rows if row.gold >= 0]
    prefixes: dict[str, Any] = {
        "distiller": slow.vectors,
        ZERO_SHOT: lambda row: torch.zeros(0, 32, dtype=torch.float64),
        ALL: lambda row: embed(torch.tensor(row.input_ids_T[: row.query_start].tolist())),
    }
    for name, prefix_of in prefixes.items():
        right = [best_candidate(slow, prefix_of(row), row) == row.gold for row in chosen]
        (task,) = found[name].tasks
        assert task.num_episodes == len(chosen)
        assert task.numbers["accuracy"] == pytest.approx(np.mean(right)), name
        assert found[name].num_left_out == len(rows) - len(chosen)
    positions = found["distiller"].positions
    assert positions["kl_to_teacher"] != found[ZERO_SHOT].positions["kl_to_teacher"]
    assert not found[ALL].positions
    assert found[ALL].tasks != found[ZERO_SHOT].tasks


def test_zero_shot_is_measured_by_plain_queries(data: MendData) -> None:
    models = data.models
    found = evaluate_vectors(
        {"d": models.distiller}, models.teacher, data.tables("documents", "exact"), options=OPTIONS
    )
    slow, kl = SlowMend(models), []
    for row in (row for row in data.rows("documents").values() if row.split == "heldout"):
        query_Q = torch.tensor(row.input_ids_T[row.query_start :].tolist())
        with torch.no_grad():
            own_PV = slow.reader(input_ids=query_Q[None]).logits[0, :-1].log_softmax(-1)
            teacher_PV = slow.teacher(row)
        kl.append((teacher_PV.exp() * (teacher_PV - own_PV)).sum(-1))
    positions = found[ZERO_SHOT].positions
    assert positions["kl_to_teacher"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)
    assert found["d"].tasks == ()


def test_other_tables_are_refused(data: MendData) -> None:
    models = data.models
    with pytest.raises(ConfigError, match="is table teacher_logits, expected demonstrations first"):
        evaluate_vectors(
            {"d": models.distiller},
            models.teacher,
            data.tables("documents", "exact")[::-1],
            options=OPTIONS,
        )
