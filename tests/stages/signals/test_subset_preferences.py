"""Subset preferences: the right subsets, their scores by plain forward passes, ranks with ties."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.errors import ConfigError
from schemas.tables.episodes import Episode, subset_input_ids
from schemas.tables.subset_preferences import SubsetPreferences, split_subsets
from stages.models.spec import EngineOptions, ModelSpec
from stages.signals.subset_preferences.sampling import draw_subsets
from stages.signals.subset_preferences.stage import SubsetPreferencesStage
from stages.signals.subset_preferences.work import ranks_of
from stages.stage import Rejected, StageContext
from tests.fixtures.tiny_episodes import PlainModel, as_shard, make_episode


def stage_of(**changes: Any) -> SubsetPreferencesStage:
    body = {"stage": "subset_preferences", "input": "episodes", "model": "teacher"}
    return SubsetPreferencesStage.model_validate(body | changes)


def scored(
    stage: SubsetPreferencesStage, model: Path, tmp_path: Path, episodes: Sequence[Episode]
) -> list[SubsetPreferences | Rejected]:
    spec = ModelSpec(model, "float32", "transformers", 64)
    engine = EngineOptions(device="cpu", cache_dir=tmp_path)
    context = StageContext(folder=tmp_path, vocab_size=512, models={"teacher": spec}, engine=engine)
    with stage.open(context) as work:
        return list(work(as_shard(episodes, 512)))


def test_log_q_is_the_answers_sum_after_the_subset_and_the_query(
    tiny_model: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    episodes = [make_episode(rng, answer=(20, 21, 22)[: 1 + i % 3]) for i in range(4)]
    plain = PlainModel(tiny_model)
    rows = scored(stage_of(), tiny_model, tmp_path, episodes)
    for episode, row in zip(episodes, rows, strict=True):
        assert isinstance(row, SubsetPreferences)
        answer = episode.input_ids_T[episode.answer_start :]
        assert row.num_answer_tokens == len(answer)
        subsets = split_subsets(row.subset_demonstrations_S, row.subset_sizes_N)
        assert len(subsets) == 4
        for subset, logprob in zip(subsets, row.answer_logprobs_N, strict=True):
            spans = episode.demonstrations_M3
            starts = [*spans[:, 0].tolist(), episode.query_start]
            prompt = [
                token
                for m in subset
                for token in episode.input_ids_T[starts[m] : starts[m + 1]].tolist()
            ] + episode.input_ids_T[episode.query_start : episode.answer_start].tolist()
            assert abs(plain.logprob(prompt, answer) - logprob) < 3e-5
        best = int(np.argmax(row.answer_logprobs_N))
        assert row.ranks_N[best] == 1 and sorted(row.ranks_N.tolist()) == [1, 2, 3, 4]


@pytest.mark.parametrize("num", [3, 14])
def test_subsets_are_distinct_ordered_and_never_empty(num: int) -> None:
    rng = np.random.default_rng(2)
    stage = stage_of(num_subsets=4)
    for _ in range(50):
        episode = make_episode(rng, num_demonstrations=num)
        drawn = draw_subsets(stage, episode)
        assert len(set(drawn.subsets)) == 4
        assert all(subset and list(subset) == sorted(subset) for subset in drawn.subsets)
        again = draw_subsets(stage, episode)
        assert again.subsets == drawn.subsets
        for subset, ids_T in zip(drawn.subsets, drawn.input_ids, strict=True):
            rebuilt = subset_input_ids(
                episode.input_ids_T, episode.demonstrations_M3, episode.query_start, subset
            )
            assert rebuilt.tolist() == ids_T.tolist()
    assert draw_subsets(stage_of(seed=1), episode).subsets != drawn.subsets


@pytest.mark.parametrize("num", [3, 13])
def test_uniform_draws_every_subset_equally_often(num: int) -> None:
    """Chi-squared over the first subset drawn (three demonstrations), or over its size."""
    rng = np.random.default_rng(3)
    stage = stage_of(num_subsets=2)
    draws = 2100
    counts: Counter[Any] = Counter()
    episode = make_episode(rng, num_demonstrations=num)
    for i in range(draws):
        object.__setattr__(episode, "sample_id", f"{i:024x}")
        first = draw_subsets(stage, episode).subsets[0]
        counts[first if num == 3 else first[0]] += 1
    if num == 3:
        expected = dict.fromkeys(counts, draws / 7)
        assert len(counts) == 7
    else:  # the first demonstration kept is number m with chance 2^-(m+1)
        expected = {m: draws / 2 ** (m + 1) for m in range(4)}
    chi_squared = sum((counts[key] - e) ** 2 / e for key, e in expected.items())
    assert chi_squared < 22.5  # 99.9 % of chi-squared with 6 degrees of freedom


def test_equal_demonstrations_make_equal_subsets() -> None:
    rng = np.random.default_rng(4)
    episode = make_episode(rng, num_demonstrations=2, repeat_first=True)
    drawn = draw_subsets(stage_of(num_subsets=3), episode)
    assert len(drawn.subsets) == 2  # one of the two, or both
    assert (
        draw_subsets(
            stage_of(num_subsets=3, sampler={"kind": "uniform", "allow_empty": True}), episode
        ).subsets.count(())
        == 1
    )


def test_similarity_varies_the_number_of_similar_demonstrations() -> None:
    rng = np.random.default_rng(5)
    sampler = {"kind": "similarity", "encoder": "encoder"}
    stage = stage_of(num_subsets=4, sampler=sampler)
    similarities = np.array([0.1, 0.9, 0.2, 0.8, 0.7, 0.0])
    similar = {1, 3, 4}
    for _ in range(30):
        drawn = draw_subsets(stage, make_episode(rng, num_demonstrations=6), similarities)
        numbers = [len(similar & set(subset)) for subset in drawn.subsets]
        assert sorted(numbers) == [0, 1, 2, 3]


def test_too_few_subsets_are_refused_for_all_and_rejected_for_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(6)
    small = make_episode(rng, num_demonstrations=2)
    with pytest.raises(ConfigError) as error:
        scored(stage_of(), tiny_model, tmp_path, [small])
    assert str(error.value) == (
        "num_subsets is 4, but episodes of 2 demonstrations have 3 subsets: lower it, or give the "
        "episodes more demonstrations"
    )
    rows = scored(stage_of(), tiny_model, tmp_path, [small, make_episode(rng)])
    reason = "fewer than 4 distinct subsets of its demonstrations"
    assert rows[0] == Rejected(small.sample_id, reason)
    assert isinstance(rows[1], SubsetPreferences)


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ([-1.0, -5.0, -2.0, -9.0], [1, 3, 2, 4]),
        ([-2.0, -2.0004, -1.0, -3.0], [2, 2, 1, 4]),
        ([-1.0, -1.0008, -1.0016, -1.2], [1, 1, 1, 4]),  # a chain is one tie
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1]),
    ],
)
def test_ties_share_the_smallest_rank(scores: list[float], ranks: list[int]) -> None:
    assert ranks_of(np.array(scores, np.float32), tie_tolerance=1e-3).tolist() == ranks
