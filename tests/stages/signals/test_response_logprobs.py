"""The ``response_logprobs`` stage against one plain float64 pass a response."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import ConfigError
from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from schemas.tables.response_logprobs import ResponseLogprobs
from schemas.tables.response_token_logprobs import ResponseTokenLogprobs
from schemas.tables.responses import RESPONSES
from stages.models.engines.engine import Engine, open_engine
from stages.models.spec import EngineOptions
from stages.signals.response_logprobs.stage import ResponseLogprobsStage
from stages.signals.response_logprobs.work import score_responses
from stages.signals.scoring.responses import prompted_of
from stages.stage import Rejected
from tests.fixtures.cached_data import VOCAB_SIZE, save_model
from tests.fixtures.episode_data import successor_model
from tests.fixtures.tiny_responses import (
    as_pair_shard,
    as_shard,
    context_of,
    make_pair,
    make_row,
    plain_logprobs,
    random_rows,
    responses_of,
)

STAGE = ResponseLogprobsStage(stage="response_logprobs", input="pairs", model="teacher")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a window of 64 tokens."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    # vLLM on a CPU takes heads of 32 and more.
    save_model(folder, seed=1, num_layers=2, head_dim=32)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    options = context_of(folder.parent, VOCAB_SIZE, {"teacher": folder}).engine
    with open_engine("transformers", folder, dtype="float32", options=options) as engine:
        yield engine


def scored(engine: Engine, shard: Any) -> list[Any]:
    return list(score_responses(engine, prompted_of(shard), EngineOptions(device="cpu")))


def plain_sum(folder: Path, prompt: Any, response: Any) -> float:
    logprobs_AV = plain_logprobs(folder, prompt, response)
    return float(logprobs_AV[np.arange(len(response)), response].sum())


def random_pairs() -> list[PreferencePair]:
    rng = np.random.default_rng(3)
    lengths = ((5, 9, 1), (2, 1, 7), (11, 4, 4))
    return [make_pair(*(rng.integers(1, VOCAB_SIZE, n).tolist() for n in row)) for row in lengths]


def test_pairs_are_scored_chosen_first(folder: Path, tmp_path: Path) -> None:
    pairs = random_pairs()
    with STAGE.open(context_of(tmp_path, VOCAB_SIZE, {"teacher": folder})) as work:
        rows = list(work(as_pair_shard(pairs, VOCAB_SIZE)))
    for pair, row in zip(pairs, rows, strict=True):
        assert isinstance(row, ResponseLogprobs) and row.sample_id == pair.sample_id
        sides = pair.chosen_ids_C, pair.rejected_ids_R
        expected = [plain_sum(folder, pair.prompt_ids_T, side) for side in sides]
        np.testing.assert_allclose(row.response_logprobs_N, expected, atol=1e-4)
        assert row.response_num_tokens_N.tolist() == [len(side) for side in sides]


def test_all_responses_to_a_prompt_are_scored(folder: Path, engine: Engine) -> None:
    rows = random_rows(np.random.default_rng(4), VOCAB_SIZE, (1, 4, 2))
    for row, found in zip(rows, scored(engine, as_shard(rows, VOCAB_SIZE)), strict=True):
        expected = [plain_sum(folder, row.prompt_ids_T, ids) for ids in responses_of(row)]
        np.testing.assert_allclose(found.response_logprobs_N, expected, atol=1e-4)
        assert found.response_num_tokens_N.tolist() == row.response_lengths_N.tolist()


def test_the_log_prob_of_each_token_is_kept(folder: Path, tmp_path: Path) -> None:
    """Of responses and of pairs; what names a table of sums does not know of the setting."""
    stage = STAGE.model_copy(update={"per_token": True})
    context = context_of(tmp_path, VOCAB_SIZE, {"teacher": folder})
    rows = random_rows(np.random.default_rng(6), VOCAB_SIZE, (2, 1, 3))
    pairs = random_pairs()
    with stage.open(context) as work:
        found = list(work(as_shard(rows, VOCAB_SIZE)))
        of_pairs = list(work(as_pair_shard(pairs, VOCAB_SIZE)))
    asked = [(row.sample_id, row.prompt_ids_T, responses_of(row)) for row in rows]
    for pair in pairs:
        sides = [pair.chosen_ids_C.tolist(), pair.rejected_ids_R.tolist()]
        asked.append((pair.sample_id, pair.prompt_ids_T, sides))
    for (sample_id, prompt, responses), row in zip(asked, [*found, *of_pairs], strict=True):
        assert isinstance(row, ResponseTokenLogprobs) and row.sample_id == sample_id
        expected = [
            plain_logprobs(folder, prompt, ids)[np.arange(len(ids)), ids] for ids in responses
        ]
        np.testing.assert_allclose(row.token_logprobs_A, np.concatenate(expected), atol=1e-5)
        assert row.response_num_tokens_N.tolist() == [len(ids) for ids in responses]
    assert stage.bind(context).table is stage.table is not STAGE.table
    assert "per_token" not in STAGE.hashed()["config"]
    assert stage.hashed()["config"]["per_token"] is True


def test_the_prompts_last_token_predicts_the_first_of_the_response(tmp_path: Path) -> None:
    """v + 1 is sure to follow v: 20 nats are lost for each position that is off."""
    successor_model().save_pretrained(tmp_path / "model")
    pair = make_pair([40, 10], [11, 12, 13], [12, 13, 14])
    with STAGE.open(context_of(tmp_path / "out", 64, {"teacher": tmp_path / "model"})) as work:
        (row,) = work(as_pair_shard([pair], 64))
    assert isinstance(row, ResponseLogprobs)
    assert row.response_logprobs_N[0] > -1e-3
    assert row.response_logprobs_N[1] < -10  # only 12 after 10 is wrong, the rest follows
    assert row.response_logprobs_N[1] > -200


def test_order_and_company_change_nothing(engine: Engine) -> None:
    rows = random_rows(np.random.default_rng(5), VOCAB_SIZE, (2, 1, 3))
    there = scored(engine, as_shard(rows, VOCAB_SIZE))
    back = scored(engine, as_shard(rows[::-1], VOCAB_SIZE))[::-1]
    for a, b in zip(there, back, strict=True):
        np.testing.assert_array_equal(a.response_logprobs_N, b.response_logprobs_N)


def test_rows_that_cannot_be_scored_are_rejected_one_by_one(engine: Engine) -> None:
    fits = make_pair(range(1, 61), [1, 2, 3, 4, 5], [6])  # 64 tokens are fed: the window
    long = make_pair(range(1, 61), [6], [1, 2, 3, 4, 5, 6])
    foreign = make_pair([1, 2], [3, 4], [5, 307])
    rows = scored(engine, as_pair_shard([long, fits, foreign], VOCAB_SIZE))
    assert rows[0] == Rejected(long.sample_id, "longer than the model's window of 64 tokens")
    assert isinstance(rows[1], ResponseLogprobs) and rows[1].sample_id == fits.sample_id
    reason = "token id 307 outside the teacher's vocabulary of 307"
    assert rows[2] == Rejected(foreign.sample_id, reason)


def test_scores_that_are_no_numbers_are_rejected(folder: Path, engine: Engine) -> None:
    """An infinite row of the head is the vocabulary's, and so every position's."""
    row = make_row([1, 2], [[3]], VOCAB_SIZE)
    weight_VD = engine.head.weight_VD
    kept = weight_VD[9].clone()
    weight_VD[9] = torch.inf
    try:
        found = scored(engine, as_shard([row], VOCAB_SIZE))
    finally:
        weight_VD[9] = kept
    assert found == [Rejected(row.sample_id, "non-finite logits")]


def test_a_window_set_too_small_is_refused(folder: Path, tmp_path: Path) -> None:
    context = context_of(tmp_path, VOCAB_SIZE, {"teacher": folder}, max_model_len=4)
    with (
        STAGE.open(context) as work,
        pytest.raises(ConfigError, match="max_model_len is 4, a row has"),
    ):
        list(work(as_pair_shard(random_pairs(), VOCAB_SIZE)))


def test_what_the_plan_is_told(folder: Path, tmp_path: Path) -> None:
    assert STAGE.CONSUMES == (PREFERENCE_PAIRS, RESPONSES)
    assert STAGE.bind(context_of(tmp_path, VOCAB_SIZE, {"teacher": folder})).table is STAGE.table


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_agrees(folder: Path, tmp_path: Path) -> None:
    pairs = random_pairs()
    context = context_of(
        tmp_path, VOCAB_SIZE, {"teacher": folder}, "vllm", kv_cache_memory_bytes=1 << 28
    )
    with STAGE.open(context) as work:
        rows = list(work(as_pair_shard(pairs, VOCAB_SIZE)))
    for pair, row in zip(pairs, rows, strict=True):
        assert isinstance(row, ResponseLogprobs)
        sides = pair.chosen_ids_C, pair.rejected_ids_R
        expected = [plain_sum(folder, pair.prompt_ids_T, side) for side in sides]
        np.testing.assert_allclose(row.response_logprobs_N, expected, atol=1e-3)
