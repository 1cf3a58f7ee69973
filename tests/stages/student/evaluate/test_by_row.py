"""Held-out rows one by one: against plain forwards in float64, and their means are the report's.

Dimensions: P = scored positions, T = tokens, V = vocabulary.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.dataset import open_dataset
from schemas.scored_spans import scored_targets
from stages.student.evaluate.by_row import RowScores, read_rows, write_rows
from stages.student.evaluate.positions import evaluate
from tests.fixtures.cached_data import CachedData, make_cached_data, spans_table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("data"))


def logprobs_of(folder: Path, ids_T: np.ndarray) -> np.ndarray:
    """[T - 1, V] by transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.inference_mode():
        logits_TV = model(torch.from_numpy(ids_T.astype(np.int64))[None]).logits[0]
    return np.asarray(logits_TV[:-1].log_softmax(-1).numpy())


def test_each_row_is_that_of_a_plain_forward(data: CachedData) -> None:
    by_row = RowScores()
    report = evaluate(data.student, data.tables("exact"), batch_size=3, by_row=by_row)
    rows = open_dataset(data.tables("exact"), split="heldout")
    for index, scores in enumerate(by_row.rows):
        ids_T = rows[index]["input_ids_T"]
        student_PV, teacher_PV = (logprobs_of(m, ids_T) for m in (data.student, data.teacher))
        next_P = student_PV[np.arange(len(student_PV)), ids_T[1:].astype(int)]
        kl = (np.exp(teacher_PV) * (teacher_PV - student_PV)).sum(axis=1).mean()
        assert scores["sample_id"] == rows[index]["sample_id"]
        assert scores["positions"] == len(ids_T) - 1
        assert scores["cross_entropy"] == pytest.approx(-next_P.mean(), abs=1e-4)
        assert scores["kl_to_teacher"] == pytest.approx(kl, abs=5e-3)  # float16 states
    assert len(by_row.rows) == len(rows)
    counts = [scores["positions"] for scores in by_row.rows]
    for name in ("cross_entropy", "kl_to_teacher"):
        weighed = np.average([scores[name] for scores in by_row.rows], weights=counts)
        assert report[name] == pytest.approx(weighed, rel=1e-5)
    assert report["tokens"] == sum(counts)


def test_rows_with_scored_spans_and_without_a_teacher(data: CachedData) -> None:
    for tables in (data.chats("top_k")[:1], [spans_table(data)]):
        by_row = RowScores()
        report = evaluate(data.student, tables, by_row=by_row)
        rows = open_dataset(tables, split="heldout")
        counts = [len(scored_targets(rows[index])) for index in range(len(rows))]
        assert [scores["positions"] for scores in by_row.rows] == counts
        assert {scores["kl_to_teacher"] for scores in by_row.rows} == {None}
        own = [scores["cross_entropy"] for scores in by_row.rows]
        assert report["cross_entropy"] == pytest.approx(np.average(own, weights=counts), rel=1e-5)


def test_rows_are_written_student_after_student(tmp_path: Path) -> None:
    one = [{"sample_id": "a", "right": True, "tau": None}, {"sample_id": "b", "token_f1": 0.5}]
    other = [{"sample_id": "a", "right": False, "tau": 1.0}, {"sample_id": "b", "token_f1": 0.25}]
    write_rows(tmp_path, {"one": one, "other": other})
    table = read_rows(tmp_path)
    assert table["student"].to_pylist() == ["one", "one", "other", "other"]
    assert table["sample_id"].to_pylist() == ["a", "b", "a", "b"]
    assert table["right"].to_pylist() == [True, None, False, None]
    assert table["tau"].to_pylist() == [None, None, 1.0, None]
    assert table["token_f1"].to_pylist() == [None, 0.5, None, 0.25]


def test_a_report_without_rows_leaves_no_file(tmp_path: Path) -> None:
    write_rows(tmp_path, {"one": [], "other": []})
    assert not list(tmp_path.iterdir())
