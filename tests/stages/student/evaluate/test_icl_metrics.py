"""Metrics of in-context evaluation against worked examples and slow loops.

Dimensions: N = candidates or subsets, M = draws, Q = queries.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from stages.student.evaluate.icl_metrics import (
    accuracy,
    best_and_worst_agree,
    candidate_logprobs,
    candidate_scores,
    exact_match,
    kendall_tau_b,
    kl_divergence,
    macro_f1,
    majority_baseline,
    majority_vote,
    mean_and_spread,
    normalise_answer,
    precision_at,
    predict,
    random_precision,
    rank_of,
    token_f1,
)
from stages.student.evaluate.icl_tasks import STUDENT, TEACHER, choice_numbers, make_choice

NAN = float("nan")


def scores_with_ties(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, count) / 4 - 3.0


@pytest.mark.parametrize("seed", range(20))
def test_rank_and_prediction_against_a_loop(seed: int) -> None:
    scores_N = scores_with_ties(6, seed)
    for gold, own in enumerate(scores_N):
        others = [score for n, score in enumerate(scores_N) if n != gold]
        rank = 1 + sum(score >= own for score in others)
        assert rank_of(scores_N, gold) == rank
        assert (predict(scores_N, gold) == gold) == (rank == 1)
        assert scores_N[predict(scores_N, gold)] == max(scores_N)


def test_ties_and_nan_never_help() -> None:
    constant_N = np.full(5, -1.0)
    assert [rank_of(constant_N, gold) for gold in range(5)] == [5] * 5
    assert all(predict(constant_N, gold) != gold for gold in range(5))
    assert rank_of(np.array([NAN, -1.0, -2.0]), 0) == 3
    assert rank_of(np.array([-1.0, NAN, -2.0]), 0) == 2
    assert predict(np.array([-1.0, NAN, -2.0]), 0) == 1
    assert predict(np.array([NAN, NAN]), 1) == 0
    assert rank_of(np.array([-3.0]), 0) == 1 and predict(np.array([-3.0]), 0) == 0


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_model_of_equal_scores_has_nothing_right_wherever_the_right_one_stands(
    place: int,
) -> None:
    choices = [
        make_choice(
            {
                "sample_id": f"{query}-{draw}",
                "query_id": str(query),
                "draw": draw,
                "candidate_ids_C": np.arange(4 * query, 4 * query + 4),
                "candidate_lengths_N": np.ones(4, np.int32),
                "gold": place,
            },
            {STUDENT: np.zeros(4), TEACHER: np.zeros(4)},
        )
        for query in range(5)
        for draw in range(3)
    ]
    numbers = choice_numbers(choices)
    for name in ("accuracy", "vote_accuracy", "teacher_accuracy", "teacher_vote_accuracy"):
        assert numbers[name] == 0
    assert numbers["candidate_agreement"] == 0
    assert numbers["random_accuracy"] == 1 / 4


def test_precision_at_k() -> None:
    ranks_Q = [1, 2, 10, 11, 3]
    assert precision_at(ranks_Q, 1) == 1 / 5
    assert precision_at(ranks_Q, 10) == 4 / 5


def test_mean_and_sum_scores_prefer_different_candidates() -> None:
    sums_N, counts_N = np.array([-3.0, -4.0], np.float32), np.array([1, 4])
    np.testing.assert_array_equal(candidate_scores(sums_N, counts_N, "sum"), [-3.0, -4.0])
    np.testing.assert_array_equal(candidate_scores(sums_N, counts_N, "mean"), [-3.0, -1.0])
    np.testing.assert_array_equal(candidate_scores(sums_N, counts_N), [-3.0, -1.0])


@pytest.mark.parametrize("seed", range(5))
def test_candidate_distribution_and_kl_against_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    teacher_N, student_N = rng.normal(size=(2, 7)) * 30 - 900  # exp of the bare scores is 0
    p, q = (
        [math.exp(s - max(scores)) / sum(math.exp(t - max(scores)) for t in scores) for s in scores]
        for scores in (teacher_N.tolist(), student_N.tolist())
    )
    logprobs = candidate_logprobs(teacher_N), candidate_logprobs(student_N)
    np.testing.assert_allclose(np.exp(logprobs[0]), p, rtol=1e-9)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    assert kl_divergence(*logprobs) == pytest.approx(expected, rel=1e-9)
    assert kl_divergence(logprobs[0], logprobs[0]) == 0


def test_kl_where_one_side_rules_a_candidate_out() -> None:
    sure = candidate_logprobs(np.array([0.0, -np.inf]))
    even = candidate_logprobs(np.array([0.0, 0.0]))
    assert kl_divergence(sure, even) == pytest.approx(math.log(2))
    assert kl_divergence(even, sure) == math.inf


def test_macro_f1_worked_example() -> None:
    """Label 0: P 2/3, R 1, F1 0.8; labels 1 and 2 are never right: 0.8 / 3."""
    gold, predicted = [0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1]
    assert macro_f1(gold, predicted) == pytest.approx(0.8 / 3)
    assert accuracy(gold, predicted) == pytest.approx(2 / 6)


def slow_macro_f1(gold: Sequence[object], predicted: Sequence[object]) -> float:
    found = []
    for label in set(gold) | set(predicted):
        both = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        precision = both / max(sum(p == label for p in predicted), 1)
        recall = both / max(sum(g == label for g in gold), 1)
        found.append(2 * precision * recall / (precision + recall) if both else 0.0)
    return statistics.mean(found)


@pytest.mark.parametrize("seed", range(10))
def test_macro_f1_against_precision_and_recall(seed: int) -> None:
    gold, predicted = np.random.default_rng(seed).integers(0, 5, (2, 9)).tolist()
    assert macro_f1(gold, predicted) == pytest.approx(slow_macro_f1(gold, predicted))


def test_a_label_nobody_uses_is_left_out_and_a_wrong_one_counts() -> None:
    assert macro_f1(["a", "a"], ["a", "a"]) == 1.0
    assert macro_f1(["a", "a"], ["a", "b"]) == pytest.approx((2 / 3 + 0) / 2)


def test_baselines() -> None:
    gold = ["a", "b", "a", "c"]
    share, f1 = majority_baseline(gold)
    assert share == 0.5 and f1 == pytest.approx(slow_macro_f1(gold, ["a"] * 4))
    assert random_precision([2, 4]) == pytest.approx((0.5 + 0.25) / 2)
    assert random_precision([20, 5], 10) == pytest.approx((0.5 + 1.0) / 2)


def test_mean_and_sample_deviation() -> None:
    values = [0.5, 0.25, 0.75, 0.6]
    spread = mean_and_spread(values)
    assert spread.mean == pytest.approx(statistics.mean(values))
    assert spread.deviation == pytest.approx(statistics.stdev(values))
    assert spread.count == 4
    assert mean_and_spread([0.5]).deviation is None
    with pytest.raises(ValueError, match="no value"):
        mean_and_spread([])


def test_votes() -> None:
    first, second, third = [-1.0, -2.0, -9.0], [-2.0, -1.0, -9.0], [-2.0, -1.5, -9.0]
    assert majority_vote(np.array([first, second, third]), gold=0) == 1
    assert majority_vote(np.array([first]), gold=2) == 0
    # One vote each: the surer draw wins, whichever is gold, whatever the scale of the scores.
    sure = [-0.1, -4.0, -9.0]
    for gold in range(3):
        assert majority_vote(np.array([sure, second]), gold=gold) == 0
        assert majority_vote(np.array([np.array(sure) - 50, second]), gold=gold) == 0
    # Equal votes and equal masses: against the gold.
    mirrored = np.array([[-1.0, -2.0], [-2.0, -1.0]])
    assert majority_vote(mirrored, gold=0) == 1 and majority_vote(mirrored, gold=1) == 0


@pytest.mark.parametrize("seed", range(20))
def test_votes_against_a_count(seed: int) -> None:
    scores_MN = np.random.default_rng(seed).normal(size=(5, 3))
    probs_MN = np.exp(scores_MN) / np.exp(scores_MN).sum(axis=1, keepdims=True)
    counts = Counter(scores_MN.argmax(axis=1).tolist())
    expected = max(range(3), key=lambda n: (counts[n], probs_MN[:, n].sum()))
    assert {majority_vote(scores_MN, gold) for gold in range(3)} == {expected}


def test_best_and_worst_subset() -> None:
    ranks_N = np.array([2, 1, 4, 3])
    assert best_and_worst_agree(ranks_N, np.array([-2.0, -1.0, -9.0, -3.0])) == (True, True)
    assert best_and_worst_agree(ranks_N, np.array([-1.0, -2.0, -9.0, -3.0])) == (False, True)
    assert best_and_worst_agree(ranks_N, np.array([-2.0, -1.0, -3.0, -9.0])) == (True, False)
    # Tied by the teacher: counted out. Tied by the student: no agreement.
    assert best_and_worst_agree(np.array([1, 1, 4, 3]), -np.arange(4.0)) == (None, False)
    assert best_and_worst_agree(np.array([1, 2, 3, 3]), -np.arange(4.0)) == (True, None)
    assert best_and_worst_agree(ranks_N, np.array([-1.0, -1.0, -9.0, -9.0])) == (False, False)


def test_kendall_tau_b() -> None:
    """Ties on both sides, of 10 pairs 2 are tied in a, 1 in b; 2 concordant, 6 discordant."""
    a_N, b_N = np.array([12, 2, 1, 12, 2]), np.array([1, 4, 7, 1, 0])
    concordant = discordant = a_untied = b_untied = 0
    for i, j in itertools.combinations(range(5), 2):
        product = (a_N[i] - a_N[j]) * (b_N[i] - b_N[j])
        concordant, discordant = concordant + (product > 0), discordant + (product < 0)
        a_untied, b_untied = a_untied + (a_N[i] != a_N[j]), b_untied + (b_N[i] != b_N[j])
    expected = (concordant - discordant) / math.sqrt(a_untied * b_untied)
    assert kendall_tau_b(a_N, b_N) == pytest.approx(expected)
    assert kendall_tau_b(a_N, b_N) == pytest.approx(-0.471404520791)
    assert kendall_tau_b(np.arange(4), np.arange(4) * 2.5) == 1.0
    assert kendall_tau_b(np.arange(4), -np.arange(4)) == -1.0
    assert kendall_tau_b(np.arange(4), np.zeros(4)) is None


def test_answers_are_normalised_as_squad_does() -> None:
    assert normalise_answer("  The   U.S.\tArmy,  an Army of a kind! ") == "us army army of kind"
    assert normalise_answer("theory another") == "theory another"  # articles are whole words
    assert exact_match("The Beatles", "beatles.") and not exact_match("Beatles", "Beetles")
    assert exact_match("", "the")  # nothing is left of either


@pytest.mark.parametrize(
    ("gold", "predicted", "expected"),
    [
        ("new york city", "New York", 2 * (1.0 * 2 / 3) / (1.0 + 2 / 3)),
        ("a cat", "the cat", 1.0),
        ("cat", "dog", 0.0),
        ("cat cat dog", "cat", 2 * (1.0 * 1 / 3) / (1.0 + 1 / 3)),
        ("cat", "cat cat", 2 * (0.5 * 1.0) / (0.5 + 1.0)),
        ("", "", 1.0),
        ("cat", "", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_word_f1(gold: str, predicted: str, expected: float) -> None:
    assert token_f1(gold, predicted) == pytest.approx(expected)
