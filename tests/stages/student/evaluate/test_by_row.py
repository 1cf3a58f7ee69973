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
    assert by_row.sample_ids == [rows[index]["sample_id"] for index in range(len(rows))]
    for place in range(len(rows)):
        ids_T = rows[place]["input_ids_T"]
        student_PV, teacher_PV = (logprobs_of(m, ids_T) for m in (data.student, data.teacher))
        next_P = student_PV[np.arange(len(student_PV)), ids_T[1:].astype(int)]
        kl = (np.exp(teacher_PV) * (teacher_PV - student_PV)).sum(axis=1).mean()
        assert by_row.positions[place] == len(ids_T) - 1
        assert by_row.cross_entropies[place] == pytest.approx(-next_P.mean(), abs=1e-4)
        assert by_row.kls[place] == pytest.approx(kl, abs=5e-3)  # float16 states
    means = {"cross_entropy": by_row.cross_entropies, "kl_to_teacher": by_row.kls}
    for name, values in means.items():
        weighed = np.average(np.array(values, float), weights=by_row.positions)
        assert report[name] == pytest.approx(weighed, rel=1e-5)
    assert report["tokens"] == sum(by_row.positions)


def test_rows_with_scored_spans_and_without_a_teacher(data: CachedData) -> None:
    for tables in (data.chats("top_k")[:1], [spans_table(data)]):
        by_row = RowScores()
        report = evaluate(data.student, tables, by_row=by_row)
        rows = open_dataset(tables, split="heldout")
        counts = [len(scored_targets(rows[index])) for index in range(len(rows))]
        assert by_row.positions == counts and by_row.kls == [None] * len(counts)
        weighed = np.average(by_row.cross_entropies, weights=by_row.positions)
        assert report["cross_entropy"] == pytest.approx(weighed, rel=1e-5)


def test_rows_are_written_student_after_student(tmp_path: Path) -> None:
    one = RowScores(["a", "b"], [3, 4], [1.5, 2.5], [0.25, 0.5])
    other = RowScores(["a", "b"], [3, 4], [1.0, 2.0], [None, None])
    write_rows(tmp_path, {"one": one, "other": other})
    table = read_rows(tmp_path)
    assert table["student"].to_pylist() == ["one", "one", "other", "other"]
    assert table["kl_to_teacher"].to_pylist() == [0.25, 0.5, None, None]
    assert table["positions"].to_pylist() == [3, 4, 3, 4]
