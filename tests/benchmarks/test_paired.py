"""Intervals over seeds and episodes: hand-worked, they cover, and they grow with both."""

import numpy as np
import pytest

from benchmarks.methods.paired import paired_interval, verdict


def test_effects_that_do_not_vary_have_no_width() -> None:
    assert paired_interval(np.full((3, 4), 0.5)) == (0.5, 0.5, 0.5)


def test_seeds_alone_give_students_interval() -> None:
    """Effects equal within a seed: mean +- t(2) s / sqrt(3) of three seeds, worked by hand."""
    effects_SE = np.repeat([[1.0], [2.0], [3.0]], 50, axis=1)
    mean, low, high = paired_interval(effects_SE)
    assert mean == 2.0
    assert high - mean == pytest.approx(4.3027 * 1.0 / np.sqrt(3), rel=0.05)
    assert mean - low == pytest.approx(high - mean)


def test_interval_covers_the_true_effect() -> None:
    """Of drawn seeds and episodes with known effects nineteen intervals of twenty hold the truth.

    400 trials: 0.95 has a standard error of 0.01; wider than 0.95 is allowed (it is conservative).
    """
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        seeds_S1, episodes_E = rng.normal(size=(5, 1)), 2.0 * rng.normal(size=40)
        noise_SE = rng.normal(size=(5, 40))
        _, low, high = paired_interval(0.7 + seeds_S1 + episodes_E + noise_SE)
        covered += low <= 0.7 <= high
    assert 0.92 <= covered / 400 <= 0.99


def test_interval_over_groups_covers_what_one_over_episodes_does_not() -> None:
    """Ten tasks of uneven size whose effects differ: their episodes tell little more than they do.

    200 trials: 0.95 has a standard error of 0.015; few groups and their uneven sizes cost some.
    """
    rng = np.random.default_rng(2)
    group_of_E = np.repeat(np.arange(10), [2, 4, 6, 8, 10, 2, 4, 6, 8, 10])
    covered = np.zeros(2)
    for _ in range(200):
        tasks_E = rng.normal(size=10)[group_of_E]
        effects_SE = 0.7 + tasks_E + rng.normal(size=(5, 1)) + rng.normal(size=(5, len(group_of_E)))
        for which, groups_E in enumerate((group_of_E, None)):
            _, low, high = paired_interval(effects_SE, groups_E)
            covered[which] += low <= 0.7 <= high
    assert 0.89 <= covered[0] / 200 <= 0.99
    assert covered[1] < covered[0]


def test_groups_of_one_episode_are_episodes() -> None:
    effects_SE = np.random.default_rng(3).normal(size=(4, 30))
    assert paired_interval(effects_SE, np.arange(30)[::-1]) == pytest.approx(
        paired_interval(effects_SE[:, ::-1]), abs=1e-12
    )
    with pytest.raises(ValueError, match="expected two groups"):
        paired_interval(effects_SE, np.zeros(30))


@pytest.mark.parametrize("bad_SE", [np.zeros((1, 5)), np.zeros((5, 1)), np.zeros(5)])
def test_one_seed_or_episode_has_no_interval(bad_SE: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected two seeds and two episodes"):
        paired_interval(bad_SE)


def test_a_missing_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        paired_interval([[0.0, np.nan], [0.0, 1.0]])


def test_verdicts() -> None:
    assert verdict(0.1, 0.3) == verdict(-0.3, -0.1, "less") == "holds"
    assert verdict(-0.3, -0.1) == verdict(0.1, 0.3, "less") == "does not hold here"
    assert verdict(-0.1, 0.1) == verdict(-0.1, 0.1, "less") == "cannot be told"
