"""A reader's answers after a distiller's vectors against slow forwards, a token at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.reports.vectors_report import vectors_report
from schemas.errors import ConfigError, IdentityMismatch
from schemas.tables.episodes import split_candidates
from stages.student.evaluate.icl import IclReport
from stages.student.evaluate.stage import ALL, FEWER, POOLED, RANDOM, ZERO_SHOT
from stages.student.evaluate.vectors import evaluate_vectors
from stages.student.options import TrainOptions
from tests.conftest import save_tiny_model
from tests.fixtures.cached_data import save_model
from tests.fixtures.demonstration_data import MendData, SlowMend, make_mend_data, make_models

pytestmark = pytest.mark.slow

OPTIONS = TrainOptions(num_workers=0)
COUNT = 7  # vectors, and so positions


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


def prefix_of(name: str, slow: SlowMend, row: Any, num_vectors: int) -> Tensor:
    """[P, R] what is before the query, written plainly; not of random vectors."""
    embed: Callable[[Tensor], Tensor] = slow.reader.model.embed_tokens
    teacher_ids, distiller_ids = row.input_ids_T[: row.query_start], row.distiller_ids_L
    if name == "distiller":
        return slow.vectors(row)
    if name == ZERO_SHOT:
        return torch.zeros(0, 32, dtype=torch.float64)
    if name == ALL:
        return embed(torch.tensor(teacher_ids.tolist()))
    if name == FEWER:
        fitting = [end for end in row.demonstration_ends_M.tolist() if end <= num_vectors]
        longer = max(teacher_ids.tolist(), distiller_ids.tolist(), key=len)
        return embed(torch.tensor(longer[: max(fitting, default=0)], dtype=torch.long))
    embedded_LR, count = embed(torch.tensor(distiller_ids.tolist())), len(distiller_ids)
    ends = [
        (m * count // num_vectors, -(-(m + 1) * count // num_vectors)) for m in range(num_vectors)
    ]
    return torch.stack([embedded_LR[start:end].mean(0) for start, end in ends])


@torch.no_grad()
def kl_of(slow: SlowMend, prefix_PR: Tensor, row: Any) -> Tensor:
    """[P] KL of the teacher to the reader after the prefix, at the scored tokens."""
    query_Q = torch.tensor(row.input_ids_T[row.query_start :].tolist())
    inputs_TR = torch.cat([prefix_PR, slow.reader.model.embed_tokens(query_Q)])
    own_PV = slow.reader(inputs_embeds=inputs_TR[None]).logits[0].log_softmax(-1)
    own_PV, teacher_PV = own_PV[len(prefix_PR) : -1], slow.teacher(row)
    kl_P: Tensor = (teacher_PV.exp() * (teacher_PV - own_PV)).sum(-1)
    return kl_P


def remarks_on(reports: dict[str, IclReport]) -> list[str]:
    """The lines below the printed table."""
    measured = {name: report.summary() for name, report in reports.items()}
    _, *lines = vectors_report(measured, [next(iter(reports))], "title")
    return [str(line) for line in lines]


def test_numbers_are_those_of_slow_forwards(data: MendData, tmp_path: Path) -> None:
    """On the training split, which has rows enough; of 7 positions some rows fill none."""
    tables = data.tables("episodes", "exact")
    models = make_models(tmp_path, distiller_width=24, num_vectors=COUNT)
    found = evaluate_vectors(
        {"distiller": models.distiller}, models.teacher, tables, split="train", options=OPTIONS
    )
    assert list(found) == ["distiller", ZERO_SHOT, RANDOM, POOLED, FEWER, ALL]
    slow = SlowMend(models)
    rows = [row for row in data.rows("episodes").values() if row.split == "train"]
    chosen = [row for row in rows if row.gold >= 0]
    for name in ("distiller", ZERO_SHOT, POOLED, FEWER, ALL):
        prefixes = {row.sample_id: prefix_of(name, slow, row, COUNT).detach() for row in rows}
        right = [best_candidate(slow, prefixes[row.sample_id], row) == row.gold for row in chosen]
        (task,) = found[name].tasks
        assert task.num_episodes == len(chosen)
        assert task.numbers["accuracy"] == pytest.approx(np.mean(right)), name
        assert found[name].num_left_out == len(rows) - len(chosen)
        positions = found[name].positions
        kl = torch.cat([kl_of(slow, prefixes[row.sample_id], row) for row in rows]).mean().item()
        assert positions["kl_to_teacher"] == pytest.approx(kl, rel=1e-3, abs=2e-4), name
        read = [len(prefix_PR) for prefix_PR in prefixes.values()]
        assert positions["positions_before_query"] == pytest.approx(np.mean(read))
        if name == FEWER:
            assert 0 < positions["rows_without_demonstration"] == read.count(0) < len(rows)
            assert max(read) <= COUNT
    assert found[RANDOM].positions["positions_before_query"] == COUNT
    (remark,) = remarks_on(found)
    assert remark.startswith(f"{FEWER}: ") and "rows read no demonstration" in remark


def test_what_the_reader_has_no_room_for_is_left_out_and_counted(
    data: MendData, tmp_path: Path
) -> None:
    """A reader of a smaller window than the teacher's: some rows' text is more than that."""
    rows = [row for row in data.rows("episodes").values() if row.split == "train"]
    queries = [row.answer_start - row.query_start for row in rows]
    answers = [
        max([len(row.input_ids_T) - row.answer_start, *row.candidate_lengths_N.tolist()])
        for row in rows
    ]
    needed = [query + answer for query, answer in zip(queries, answers, strict=True)]
    read = [row.query_start + tokens for row, tokens in zip(rows, needed, strict=True)]
    window = sorted(read)[len(read) // 2]
    assert 3 + max(needed) <= window
    teacher = tmp_path / "teacher"
    copytree(data.models.teacher, teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": window}))
    tables, models = data.tables("episodes", "exact"), data.models
    found = evaluate_vectors(
        {"d": models.distiller}, teacher, tables, split="train", options=OPTIONS
    )
    beyond = sum(tokens > window for tokens in read)
    assert found[ALL].positions["rows_beyond_window"] == beyond > 0
    held = [row for row, tokens in zip(rows, read, strict=True) if tokens <= window]
    assert found[ALL].num_episodes == sum(row.gold >= 0 for row in held) > 0
    assert found[ALL].positions["tokens"] == sum(row.num_positions for row in held)
    for name in ("d", ZERO_SHOT, RANDOM, POOLED):
        assert "rows_beyond_window" not in found[name].positions
    (remark,) = (line for line in remarks_on(found) if line.startswith(ALL))
    assert remark.startswith(f"{ALL}: {beyond} rows are left out") and "\n" not in remark


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


def test_models_that_do_not_fit_are_one_line(data: MendData, tmp_path: Path) -> None:
    """A reader of another tokenizer; another reader; a distiller without room for a row."""
    models, tables = data.models, data.tables("episodes", "exact")
    save_tiny_model(tmp_path / "strange", vocab_size=512)
    with pytest.raises(IdentityMismatch, match="has tokenizer"):
        evaluate_vectors({"d": models.distiller}, tmp_path / "strange", tables, options=OPTIONS)
    save_model(tmp_path / "other", seed=9, num_layers=1)
    with pytest.raises(ConfigError, match="the distiller was made for reader"):
        evaluate_vectors({"d": models.distiller}, tmp_path / "other", tables, options=OPTIONS)
    many = make_models(tmp_path / "many", distiller_width=24, num_vectors=62)
    with pytest.raises(ConfigError, match="the distiller has room for 2 before its 62 vectors"):
        evaluate_vectors({"d": many.distiller}, models.teacher, tables, options=OPTIONS)
