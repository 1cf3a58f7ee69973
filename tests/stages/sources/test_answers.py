"""Responses as conversations: which pass, what a row of one is, and why the others are left out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from schemas.errors import ConfigError
from schemas.sample_id import sample_id_of
from schemas.storage.shards import with_split
from schemas.tables.conversations import Conversation
from schemas.tables.prompted.responses import FINISH_REASONS, RESPONSES, Responses
from stages.models.spec import ModelSpec
from stages.sources.answers.stage import AnswersStage
from stages.stage import Rejected, StageContext

VOCAB_SIZE = 512
KEY = sample_id_of(np.array([1, 2]))


def responses(
    answers: Sequence[Sequence[int]],
    *,
    finished: Sequence[str] = (),
    means: Sequence[float] = (),
) -> Responses:
    """One row: answers after the prompt [1, 2], with a mean log-prob each."""
    ids_A = np.concatenate([np.array(ids) for ids in answers])
    logprobs = [
        np.full(len(ids), mean)
        for ids, mean in zip(answers, means or [-1.0] * len(answers), strict=True)
    ]
    codes = [FINISH_REASONS.index(reason) for reason in finished or ["stop"] * len(answers)]
    return Responses(
        sample_id=KEY,
        prompt_ids_T=np.array([1, 2], np.uint16),
        response_ids_A=ids_A,
        response_lengths_N=np.array([len(ids) for ids in answers], np.int32),
        finish_reasons_N=np.array(codes, np.uint8),
        logprobs_A=np.concatenate(logprobs).astype(np.float32),
        top_ids_AK=ids_A[:, None],
        top_logprobs_AK=np.concatenate(logprobs)[:, None].astype(np.float16),
    )


def made(row: Responses, model: Path | None = None, **settings: Any) -> list[Any]:
    """Return what becomes of one row's responses."""
    if model is not None:
        settings["tokenizer"] = "teacher"
    body = {"stage": "answers", "input": "said"} | settings
    stage = AnswersStage.model_validate(body)
    models = (
        {"teacher": ModelSpec(model, "float32", "transformers", 64)} if model is not None else {}
    )
    bound = RESPONSES.bind(vocab_size=VOCAB_SIZE, sizes={"K": 1})
    shard = with_split(pa.Table.from_batches([bound.to_batch([row])]), "heldout")
    context = StageContext(folder=Path("unused"), vocab_size=VOCAB_SIZE, models=models)
    with stage.open(context) as work:
        (found,) = work(shard)
    assert isinstance(found, list)
    return found


def kept(found: Sequence[Any]) -> list[list[int]]:
    """Return the scored ids of each row that passed."""
    rows = [one for one in found if isinstance(one, Conversation)]
    return [row.input_ids_T[slice(*row.scored_S2[0])].tolist() for row in rows]


def reasons(found: Sequence[Any]) -> list[str]:
    return [one.reason for one in found if isinstance(one, Rejected)]


def test_a_response_is_a_row_after_its_prompt() -> None:
    first, second = made(responses([[5, 6, 3], [7, 3]]))
    assert first.input_ids_T.tolist() == [1, 2, 5, 6, 3] and first.scored_S2.tolist() == [[2, 5]]
    assert second.input_ids_T.tolist() == [1, 2, 7, 3] and second.scored_S2.tolist() == [[2, 4]]
    for row in (first, second):
        assert row.sample_id == row.hashed_id != KEY == row.source_id
        assert row.split == "heldout" and not row.is_cut


FILTERS: dict[str, tuple[dict[str, Any], list[list[int]], str]] = {
    "finish": ({}, [[5, 6, 3]], "finish reason length"),
    "short": ({"min_tokens": 3}, [[5, 6, 3]], "fewer than min_tokens 3"),
    "long": ({"max_tokens": 2}, [[7, 3]], "more than max_tokens 2"),
    "unsure": ({"min_mean_logprob": -1.5}, [[5, 6, 3]], "mean log-prob below"),
    "best": ({"keep": "best"}, [[5, 6, 3]], "not the best response"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_leaves_out_what_it_says(name: str) -> None:
    settings, expected, reason = FILTERS[name]
    finished = ["stop", "length"] if name == "finish" else ["stop", "stop"]
    found = made(responses([[5, 6, 3], [7, 3]], finished=finished, means=[-1.0, -2.0]), **settings)
    assert kept(found) == expected and reasons(found)[0].startswith(reason)
    assert len(found) == 2 and all(one.sample_id == KEY for one in found if type(one) is Rejected)


def test_cut_and_equal_responses() -> None:
    row = responses([[5, 6], [7, 3], [5, 6]], finished=["length", "stop", "length"])
    found = made(row, finish_reasons=["stop", "length"])
    assert kept(found) == [[5, 6], [7, 3]] and reasons(found) == ["equal to another response"]
    assert [one.is_cut for one in found if isinstance(one, Conversation)] == [True, False]
    # An equal one that did not pass takes no place.
    cut_first = responses([[5, 6], [5, 6]], finished=["length", "stop"])
    assert kept(made(cut_first)) == [[5, 6]]


def test_text_is_searched_without_special_tokens(tiny_model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    words = ["The answer is 42.", "I do not know."]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in words]
    row = responses(ids)
    assert kept(made(row, tiny_model, matching=r"answer is \d+\.$")) == [ids[0]]
    found = made(row, tiny_model, not_matching="(?i)do not")
    assert kept(found) == [ids[0]] and reasons(found) == ["text with a match of not_matching"]


def score_file(tmp_path: Path, *records: Any, name: str = "scores.jsonl") -> dict[str, Any]:
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"kind": "jsonl", "paths": [str(path)]}


def score(response: Any, value: Any, sample_id: str = KEY) -> dict[str, Any]:
    return {"sample_id": sample_id, "response": response, "score": value}


def test_scores_of_a_user_decide(tmp_path: Path) -> None:
    """The best of those that pass, however likely the model found it; one without a score fails."""
    row = responses([[5, 6], [7, 3], [8, 9], [4, 4]], means=[-1.0, -2.0, -3.0, -0.1])
    scores = score_file(tmp_path, score(2, 0.9), score(0, 0.5), score(1, 0.7), score(9, 3.0))
    found = made(row, scores=scores, keep="best")
    assert kept(found) == [[8, 9]]
    assert reasons(found) == ["not the best response", "not the best response", "no score"]
    found = made(row, scores=scores, min_score=0.6)
    assert kept(found) == [[7, 3], [8, 9]]
    assert reasons(found) == ["score below min_score 0.6", "no score"]
    found = made(row, scores=scores, keep="best", max_tokens=1)
    assert kept(found) == [] and len(found) == 4
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"sample_id": [KEY] * 2, "response": [0, 3], "reward": [1, 2]}), path)
    columns = {"kind": "parquet", "paths": [str(path)], "column": "reward"}
    assert kept(made(row, scores=columns, keep="best")) == [[4, 4]]


def test_a_bad_score_costs_its_response_alone(tmp_path: Path) -> None:
    row = responses([[5, 6], [7, 3], [8, 9], [4, 4], [2, 2], [3, 3]])
    scores = score_file(
        tmp_path,
        score(0, 1.0),
        score(1, float("nan")),
        score(2, None),
        score(3, "high"),
        score(4, 1.0),
        score(4, 2.0),
        score("5", 1.0),
        score(0, 1.0),  # once more, and no other
        {"response": 1, "score": 1.0},
    )
    found = made(row, scores=scores, min_score=0.0)
    assert kept(found) == [[5, 6]]
    assert reasons(found) == [*["score is no finite number"] * 3, "more than one score", "no score"]


def test_scores_under_other_names_are_one_line(tmp_path: Path) -> None:
    other = score_file(tmp_path, {"sample_id": KEY, "response": 0, "reward": 1.0})
    with pytest.raises(ConfigError, match="no column 'score'; it has 'sample_id', 'response'"):
        made(responses([[5, 6]]), scores=other, keep="best")


def test_scores_are_hashed_by_content_and_leave_other_recipes_alone(tmp_path: Path) -> None:
    def config(**settings: Any) -> Any:
        stage = AnswersStage.model_validate({"stage": "answers", "input": "said"} | settings)
        return stage.hashed()["config"]

    assert set(config()) == {
        "finish_reasons", "keep", "matching", "max_tokens", "min_mean_logprob", "min_tokens",
        "not_matching",
    }  # fmt: skip
    first = config(scores=score_file(tmp_path, score(0, 1.0)), keep="best")
    (tmp_path / "elsewhere").mkdir()
    moved = score_file(tmp_path / "elsewhere", score(0, 1.0))
    assert config(scores=moved, keep="best") == first
    assert config(scores=score_file(tmp_path, score(0, 2.0)), keep="best") != first
    with pytest.raises(ConfigError, match="no file matches"):
        config(scores={"kind": "jsonl", "paths": [str(tmp_path / "none")]}, keep="best")


def test_wrong_settings_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"matching": "("},
        {"matching": "a"},
        {"tokenizer": "teacher"},
        {"finish_reasons": []},
        {"min_mean_logprob": 0.5},
        {"min_score": 0.5},
        {"scores": {"kind": "jsonl", "paths": ["a"]}},
        {"scores": {"kind": "jsonl", "paths": ["a"]}, "min_score": float("nan")},
    ]
    for settings in wrong:
        with pytest.raises(ValidationError):
            AnswersStage.model_validate({"stage": "answers", "input": "said"} | settings)
