"""Numbers about preferences against worked examples, slow loops and known coverage.

Dimensions: P = prompts.
"""

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest

from stages.models.causal_lm.implicit_rewards import implicit_rewards, preference
from stages.student.evaluate_preferences.metrics import (
    bootstrap_interval,
    own_preference_numbers,
    relative_preference_numbers,
    response_numbers,
    reward_numbers,
    win_rate,
)


def test_an_accuracy_counts_what_is_strictly_better_and_a_margin_is_a_mean() -> None:
    found = preference(np.array([-1.0, -2.0, -3.0, -4.0]), np.array([-2.0, -2.0, -1.0, -9.0]))
    assert found.accuracy == 2 / 4  # the tie is a mistake
    assert found.margin == (1 + 0 - 2 + 5) / 4


def test_a_reward_is_the_log_ratio_times_beta_in_float64() -> None:
    teacher = np.array([-10.0, -1e4 + 0.25], np.float32)
    rewards = implicit_rewards(teacher, np.array([-12.0, -1e4], np.float32), 0.1)
    np.testing.assert_allclose(rewards, [0.2, 0.1 * (float(teacher[1]) + 1e4)], rtol=1e-12)


def test_rewards_per_token_weigh_every_prompt_alike() -> None:
    numbers = reward_numbers(np.array([3.0, -1.0]), [1, 10])
    assert numbers == {"reward": 1.0, "reward_per_token": pytest.approx((3.0 - 0.1) / 2)}


def test_a_response_of_nothing_but_its_end_is_empty() -> None:
    """One token that was cut is no end; lengths count the end."""
    numbers = response_numbers([1, 1, 4, 3], [True, False, True, False])
    assert numbers == {"response_tokens": 9 / 4, "finished": 2 / 4, "empty": 1 / 4}


def test_a_students_own_view_by_sums_by_tokens_and_against_a_baseline() -> None:
    logprobs_P2 = np.array([[-8.0, -6.0], [-3.0, -4.0]])
    lengths_P2 = np.array([[8, 2], [1, 4]])
    numbers = own_preference_numbers(logprobs_P2, lengths_P2)
    assert numbers == {
        "cross_entropy": pytest.approx(11 / 9),
        "accuracy": 1 / 2,
        "margin": (-2 + 1) / 2,
        "accuracy_per_token": 1 / 2,
        "margin_per_token": pytest.approx(((-1 + 3) + (-3 + 1)) / 2),
    }
    baseline_P2 = np.array([[-9.0, -6.5], [-3.0, -4.0]])
    relative = relative_preference_numbers(logprobs_P2, baseline_P2)
    assert relative == {"relative_accuracy": 1 / 2, "relative_margin": (0.5 + 0) / 2}


@pytest.mark.parametrize("seed", range(5))
def test_a_win_rate_against_a_loop_and_its_mirror(seed: int) -> None:
    first_P, second_P = np.random.default_rng(seed).integers(0, 4, (2, 60)).astype(float)
    found, mirror = win_rate(first_P, second_P, seed=3), win_rate(second_P, first_P, seed=3)
    won = sum(a > b for a, b in zip(first_P, second_P, strict=True))
    tied = sum(a == b for a, b in zip(first_P, second_P, strict=True))
    assert (found.num_wins, found.num_ties, found.num_losses) == (won, tied, 60 - won - tied)
    assert found.rate == float(Fraction(2 * won + tied, 120))
    assert found.low < found.rate < found.high
    assert mirror.rate == pytest.approx(1 - found.rate)
    assert mirror.num_wins == found.num_losses
    assert (mirror.low, mirror.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_equal_students_have_one_half_without_doubt() -> None:
    rewards_P = np.random.default_rng(0).normal(size=30)
    found = win_rate(rewards_P, rewards_P.copy(), seed=0)
    assert (found.rate, found.low, found.high, found.num_ties) == (0.5, 0.5, 0.5, 30)


def test_the_interval_is_about_wins_not_about_how_large_they_are() -> None:
    first_P = np.array([1e6, 1.0, -1.0, 0.5] * 20)
    small = win_rate(np.sign(first_P), np.zeros(80), seed=1)
    assert win_rate(first_P, np.zeros(80), seed=1) == small


def test_an_interval_is_the_seeds_and_has_the_width_of_its_standard_error() -> None:
    values_P = np.random.default_rng(5).normal(size=400)
    low, high = bootstrap_interval(values_P, seed=7)
    assert (low, high) == bootstrap_interval(values_P, seed=7)
    assert (low, high) != bootstrap_interval(values_P, seed=8)
    error = statistics.stdev(values_P) / math.sqrt(400)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.1)
    assert bootstrap_interval(np.full(9, 0.25), seed=0) == (0.25, 0.25)


@pytest.mark.slow
def test_intervals_cover_the_true_share_about_95_times_in_100() -> None:
    """80 draws of 80 prompts: the share covered is 0.95 less what a percentile interval lacks."""
    rng = np.random.default_rng(11)
    truth = 0.5 * 0.2 + 0.5  # wins of half the prompts, ties of a fifth
    covered = 0
    for trial in range(80):
        signs_P = rng.choice([1.0, 0.0, -1.0], size=80, p=[0.5, 0.2, 0.3])
        found = win_rate(signs_P, np.zeros(80), seed=trial)
        covered += found.low <= truth <= found.high
    assert 0.87 <= covered / 80 <= 0.99
