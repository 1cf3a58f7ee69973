"""Candidate scores against one plain forward pass a token, and what they ask of the engine."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.errors import ConfigError
from schemas.tables.candidate_scores import CandidateScores
from schemas.tables.episodes import Episode
from stages.models.spec import EngineOptions, ModelSpec
from stages.signals.candidate_scores.stage import CandidateScoresStage
from stages.signals.candidate_scores.work import Branches
from stages.stage import Rejected, StageContext
from tests.fixtures.tiny_episodes import PlainModel, as_shard, make_episode

STAGE = CandidateScoresStage(stage="candidate_scores", input="episodes", model="teacher")


def context(model: Path, tmp_path: Path, **options: Any) -> StageContext:
    spec = ModelSpec(model, "float32", "transformers", 64)
    engine = EngineOptions(device="cpu", cache_dir=tmp_path, **options)
    return StageContext(folder=tmp_path, vocab_size=512, models={"teacher": spec}, engine=engine)


def scored(
    model: Path, tmp_path: Path, episodes: Sequence[Episode], **options: Any
) -> list[CandidateScores | Rejected]:
    with STAGE.open(context(model, tmp_path, **options)) as work:
        return list(work(as_shard(episodes, 512)))


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[PlainModel]:
    yield PlainModel(tiny_model)


@pytest.mark.parametrize(
    "candidates",
    [
        [(7,), (8,), (9,)],
        [(7, 8, 9), (7, 8), (7,), (10, 11)],  # one begins another
        [(7, 8, 9), (7, 8, 10), (11, 12, 13, 14)],
        [(5,)],
    ],
)
def test_each_score_is_the_sum_over_the_candidates_tokens(
    candidates: list[tuple[int, ...]], tiny_model: Path, tmp_path: Path, plain: PlainModel
) -> None:
    rng = np.random.default_rng(3)
    episodes = [make_episode(rng, candidates=candidates) for _ in range(3)]
    rows = scored(tiny_model, tmp_path, episodes)
    for episode, row in zip(episodes, rows, strict=True):
        assert isinstance(row, CandidateScores) and row.sample_id == episode.sample_id
        prompt = episode.input_ids_T[: episode.answer_start]
        expected = [plain.logprob(prompt, candidate) for candidate in candidates]
        np.testing.assert_allclose(row.candidate_logprobs_N, expected, atol=2e-5)
        assert row.candidate_num_tokens_N.tolist() == [len(c) for c in candidates]


def test_the_prompts_last_token_predicts_the_first_of_the_candidate(
    tiny_model: Path, tmp_path: Path, plain: PlainModel
) -> None:
    """One position early or late gives another number, by far."""
    rng = np.random.default_rng(4)
    episode = make_episode(rng, candidates=[(7, 8), (9, 10)])
    (row,) = scored(tiny_model, tmp_path, [episode])
    assert isinstance(row, CandidateScores)
    right = plain.logprob(episode.input_ids_T[: episode.answer_start], (7, 8))
    early = plain.logprob(episode.input_ids_T[: episode.answer_start - 1], (7, 8))
    assert abs(row.candidate_logprobs_N[0] - right) < 2e-5 < 0.01 < abs(right - early)


def test_a_generation_episode_gets_the_score_of_its_answer(
    tiny_model: Path, tmp_path: Path, plain: PlainModel
) -> None:
    episode = make_episode(np.random.default_rng(5), candidates=[], gold=-1, answer=(20, 21, 22))
    (row,) = scored(tiny_model, tmp_path, [episode])
    assert isinstance(row, CandidateScores)
    expected = plain.logprob(episode.input_ids_T[: episode.answer_start], (20, 21, 22))
    np.testing.assert_allclose(row.candidate_logprobs_N, [expected], atol=2e-5)


def test_candidates_of_one_token_need_the_prompt_alone() -> None:
    rng = np.random.default_rng(6)
    many = make_episode(rng, candidates=[(token,) for token in range(11, 500)])
    branches = Branches.of(many)
    assert branches.counts == [1]
    assert branches.sequences[0].tolist() == many.input_ids_T[:-1].tolist()
    mixed = Branches.of(make_episode(rng, candidates=[(7,), (8, 9), (8, 9, 10), (8, 11)]))
    assert mixed.counts == [3]  # 8 9 serves all: 7 from the prompt, 8 11 from 8


def test_too_long_is_rejected_and_a_setting_that_is_too_small_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(7)
    long = make_episode(rng, num_demonstrations=40)
    short = make_episode(rng, num_demonstrations=1)
    rows = scored(tiny_model, tmp_path, [long, short])
    assert rows[0] == Rejected(long.sample_id, "longer than the model's window of 256 tokens")
    assert isinstance(rows[1], CandidateScores)
    with pytest.raises(ConfigError, match="max_model_len is 64, a row has"):
        scored(tiny_model, tmp_path, [long], max_model_len=64)
