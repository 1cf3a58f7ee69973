"""Demonstrations: what teacher and distiller read of documents and episodes, cut by budgets."""

from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
import pytest

from schemas.sample_id import sample_id_of
from schemas.tables.demonstrations import Demonstrated
from schemas.tables.documents import Document
from schemas.tables.episodes import Episode, subset_input_ids
from stages.stage import Rejected
from tests.fixtures.cached_data import make_documents
from tests.fixtures.demonstration_data import cut, kept
from tests.fixtures.episode_data import as_episode, make_episodes

UNFIT = "no whole demonstration fits"


def document(length: int) -> Document:
    ids_T = np.arange(1, length + 1)
    return Document(sample_id=sample_id_of(ids_T), split="train", input_ids_T=ids_T)


def expected_demonstrations(episode: Episode, budget: int) -> list[int]:
    """The first ones whose tokens, with all before them, are within the budget."""
    ends = [*episode.demonstrations_M3[1:, 0].tolist(), episode.query_start]
    return [m for m, _ in takewhile(lambda item: item[1] <= budget, enumerate(ends))]


def test_documents_are_cut_at_a_fraction_of_their_tokens() -> None:
    documents = [row for row in make_documents() if len(row.input_ids_T) > 8]
    for source, row in zip(documents, cut("documents", documents), strict=True):
        at = int(0.8 * len(source.input_ids_T))
        assert (row.split, row.source_id) == (source.split, source.sample_id)
        assert (row.query_start, row.answer_start) == (at, len(source.input_ids_T))
        assert row.scored_S2.tolist() == [[at + 1, len(source.input_ids_T)]]
        assert row.num_positions == len(source.input_ids_T) - at - 1
        np.testing.assert_array_equal(row.input_ids_T, source.input_ids_T)
        np.testing.assert_array_equal(row.distiller_ids_L, source.input_ids_T[:at])
    (half,) = cut("documents", [document(10)], demonstration_fraction=0.5)
    assert half.query_start == 5


def test_each_reads_the_first_demonstrations_that_fit_its_budget() -> None:
    """Queries, answers and candidates are the episode's own, whatever is cut before them."""
    episodes = make_episodes()
    rows = cut("episodes", episodes, teacher_tokens=30, distiller_tokens=18)
    assert {row.num_distiller_demonstrations for row in kept(rows)} > {1}
    assert any(row.num_teacher_demonstrations < row.num_demonstrations for row in kept(rows))
    for episode, row in zip(episodes, rows, strict=True):
        spans = (episode.input_ids_T, episode.demonstrations_M3, episode.query_start)
        teachers, distillers = (expected_demonstrations(episode, n) for n in (30, 18))
        if not distillers:
            assert row == Rejected(episode.sample_id, f"{UNFIT} distiller_tokens 18")
            continue
        whole = subset_input_ids(*spans, teachers)
        np.testing.assert_array_equal(row.input_ids_T, whole)
        num_query = len(episode.input_ids_T) - episode.query_start
        np.testing.assert_array_equal(
            row.distiller_ids_L, subset_input_ids(*spans, distillers)[:-num_query]
        )
        np.testing.assert_array_equal(
            row.input_ids_T[row.query_start :], episode.input_ids_T[episode.query_start :]
        )
        seen = row.num_teacher_demonstrations, row.num_distiller_demonstrations
        assert seen == (len(teachers), len(distillers))
        assert row.num_demonstrations == len(episode.demonstrations_M3)
        ends = [*episode.demonstrations_M3[1:, 0].tolist(), episode.query_start]
        assert row.demonstration_ends_M.tolist() == ends[: max(seen)]
        answer = episode.input_ids_T[episode.answer_start :]
        np.testing.assert_array_equal(row.input_ids_T[row.answer_start :], answer)
        np.testing.assert_array_equal(row.candidate_ids_C, episode.candidate_ids_C)
        assert (row.task, row.draw, row.gold) == (episode.task, episode.draw, episode.gold)


def test_rows_that_become_equal_keep_names_of_their_own() -> None:
    """Two draws of one query, of which the budget leaves the same."""
    first = as_episode([0, 3, 4, 5, 6, 7, 8, 9], [(1, 2, 3), (4, 5, 6)], 7, [11], [], -1)
    second = as_episode([0, 3, 4, 5, 9, 9, 9, 9], [(1, 2, 3), (4, 5, 6)], 7, [11], [], -1)
    rows = cut("episodes", [first, replace(second, draw=1)], teacher_tokens=4, distiller_tokens=4)
    np.testing.assert_array_equal(rows[0].distiller_ids_L, rows[1].distiller_ids_L)
    assert rows[0].sample_id != rows[1].sample_id
    assert [row.draw for row in rows] == [0, 1]


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        ([document(4)], {}, "a query of 1 tokens, of which none follows another"),
        ([document(10)], {"demonstration_fraction": 0.05}, "no demonstration"),
        (
            [document(20)],
            {"distiller_tokens": 15},
            "no whole demonstration fits distiller_tokens 15",
        ),
        ([document(20)], {"teacher_tokens": 15}, f"{UNFIT} teacher_tokens 15"),
    ],
)
def test_a_row_that_cannot_be_cut_is_rejected(
    rows: list[Document], settings: dict[str, Any], reason: str
) -> None:
    found = cut("documents", [*rows, document(40)], **settings)
    assert found[0] == Rejected(rows[0].sample_id, reason)
    assert isinstance(found[1], Demonstrated | Rejected)


def test_an_episode_without_demonstrations_or_query_is_rejected() -> None:
    bare = as_episode([0, 5, 6], [], 1, [11], [], -1)
    asks_nothing = as_episode([0, 5, 6], [(1, 2, 3)], 3, [11, 12], [], -1)
    found = cut("episodes", [bare, asks_nothing])
    assert [row.reason for row in found] == [
        "no demonstration",
        "a query of 0 tokens, of which none follows another",
    ]


def test_a_row_says_what_is_wrong_with_it() -> None:
    (row,) = cut("documents", [document(20)])
    for change, problem in (
        ({"scored_S2": np.array([[0, 4]])}, "do not lie in order within tokens 1 to 19"),
        ({"scored_S2": np.array([[16, 20]])}, "begin before the query's second token"),
        ({"scored_S2": np.array([[18, 19], [17, 20]])}, "do not lie in order"),
        ({"answer_start": 21}, "query 16, answer 21 do not lie in order in 20 tokens"),
        ({"distiller_ids_L": np.zeros(0)}, "one each is the least"),
        ({"num_teacher_demonstrations": 2}, "demonstrations are seen of 1"),
        ({"demonstration_ends_M": np.array([15])}, r"end at \[15\], and \(1, 1\) of them in 16"),
        ({"demonstration_ends_M": np.array([8, 16])}, r"end at \[8, 16\], and \(1, 1\)"),
        ({"gold": 0}, "gold is 0 of 0 candidates"),
    ):
        with pytest.raises(ValueError, match=f"sample {row.sample_id}: .*{problem}"):
            replace(row, **change)
