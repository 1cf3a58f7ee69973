"""A student's answers by candidates and subsets, against slow forwards of transformers.

Dimensions: N = candidates or subsets, T = tokens.
"""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, StoreError
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.episodes import EPISODES, Episode
from stages.models.causal_lm.model import load_student
from stages.models.causal_lm.shared_prompt import shared_prompt_logprobs
from stages.student.evaluate.icl import IclOptions, TaskReport, measure_episodes
from stages.student.evaluate.icl_scoring import candidate_sums, subset_sums
from stages.student.evaluate.stage import EvaluateStage
from tests.fixtures.answered_episodes import SUBSETS, VOCAB_SIZE, Made, make_all
from tests.fixtures.cached_data import write_table
from tests.fixtures.tiny_recipe import teachercache

Scoring = Literal["mean", "sum"]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_all(tmp_path_factory.mktemp("episodes"), tiny_model)


@pytest.fixture(scope="module")
def student(made: Made) -> PreTrainedModel:
    return load_student(made.student, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher(made: Made) -> PreTrainedModel:
    return load_student(made.teacher, device=torch.device("cpu"))


def measured_tasks(
    made: Made, model: PreTrainedModel, *tables: str, scoring: Scoring = "mean"
) -> dict[str, TaskReport]:
    dataset = open_dataset(made.tables(*tables))
    options = IclOptions(tokenizer=made.teacher, scoring=scoring)
    return {task.task: task for task in measure_episodes(model, dataset, options).tasks}


def test_sums_are_those_of_one_token_at_a_time(made: Made, student: PreTrainedModel) -> None:
    """Every candidate and subset; spans that are one off are off by nats (answers differ)."""
    dataset = open_dataset(made.tables("subset_preferences"))
    rows = [dataset[index] for index in range(len(dataset))]
    slow, dtype = made.slow[made.student], torch.float32
    with torch.inference_mode():
        by_subset = subset_sums(student, rows, dtype=dtype)
        chosen = [row for row in rows if row["gold"] >= 0]
        by_candidate = candidate_sums(student, chosen, dtype=dtype)
    of = {episode.sample_id: episode for episode in made.episodes}
    for row, sums_N in zip(rows, by_subset, strict=True):
        expected = slow.subsets(of[row["sample_id"]])
        np.testing.assert_allclose(sums_N, expected, rtol=1e-5, atol=1e-4)
    for row, sums_N in zip(chosen, by_candidate, strict=True):
        expected = slow.candidates(of[row["sample_id"]])
        np.testing.assert_allclose(sums_N, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 60, 8192])
def test_a_shared_prompt_changes_nothing(made: Made, student: PreTrainedModel, tokens: int) -> None:
    """Candidates of 1 to 3 tokens, in micro-batches of one, a few and all."""
    for episode in made.of("kinds"):
        parts = made.parts[episode.sample_id]
        answers = [np.array(ids) for ids in parts.candidates]
        with torch.inference_mode():
            sums_N = shared_prompt_logprobs(
                student,
                np.array(parts.prompt()),
                answers,
                dtype=torch.float32,
                micro_batch_tokens=tokens,
            )
        expected = made.slow[made.student].candidates(episode)
        np.testing.assert_allclose(sums_N.numpy(), expected, rtol=1e-5, atol=1e-4)


def first_best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def slow_scores(made: Made, episode: Episode, scoring: Scoring) -> list[float]:
    sums = made.slow[made.student].candidates(episode)
    lengths = [len(ids) for ids in made.parts[episode.sample_id].candidates]
    return [s / (n if scoring == "mean" else 1) for s, n in zip(sums, lengths, strict=True)]


@pytest.mark.parametrize("scoring", ["mean", "sum"])
def test_numbers_are_those_counted_from_slow_scores(
    made: Made, student: PreTrainedModel, scoring: Scoring
) -> None:
    for name, task in measured_tasks(made, student, scoring=scoring).items():
        if name == "free":
            continue
        right, votes, ranks = defaultdict(list), defaultdict(list), []
        for episode in made.of(name):
            scores = slow_scores(made, episode, scoring)
            right[episode.draw].append(first_best(scores) == episode.gold)
            votes[episode.query_id].append((episode, scores))
            ranks.append(1 + sum(s > scores[episode.gold] for s in scores))
        draws = {draw: statistics.mean(values) for draw, values in right.items()}
        assert task.accuracy_by_draw == pytest.approx(draws)
        assert task.numbers["accuracy"] == pytest.approx(statistics.mean(draws.values()))
        assert (task.num_queries, task.num_draws) == (len(votes), len(draws))
        if len(draws) > 1:
            spread = statistics.stdev(draws.values())
            assert task.numbers["accuracy_deviation"] == pytest.approx(spread)
            won = [vote_is_right(made, said) for said in votes.values()]
            assert task.numbers["vote_accuracy"] == pytest.approx(statistics.mean(won))
        else:
            assert not {"accuracy_deviation", "vote_accuracy"} & set(task.numbers)
        for k in (1, 10):
            share = statistics.mean(rank <= k for rank in ranks)
            expected = pytest.approx(share) if name == "many" else None
            assert task.numbers.get(f"precision_at_{k}") == expected


def vote_is_right(made: Made, said: list[tuple[Episode, list[float]]]) -> bool:
    """Vote by the candidates' own tokens, so that their order in a draw does not matter."""
    mass: Counter[tuple[int, ...]] = Counter()
    votes: Counter[tuple[int, ...]] = Counter()
    for episode, scores in said:
        candidates = [tuple(ids) for ids in made.parts[episode.sample_id].candidates]
        votes[candidates[first_best(scores)]] += 1
        for share, ids in zip(torch.tensor(scores).softmax(0).tolist(), candidates, strict=True):
            mass[ids] += share
    best = max(mass, key=lambda ids: (votes[ids], mass[ids]))
    return list(best) == made.parts[said[0][0].sample_id].answer


def test_baselines_stand_beside(made: Made, student: PreTrainedModel) -> None:
    tasks = measured_tasks(made, student)
    golds = Counter(e.gold for e in made.of("kinds"))
    assert tasks["kinds"].numbers["majority_accuracy"] == max(golds.values()) / 15
    assert tasks["kinds"].numbers["random_accuracy"] == 1 / 4
    places = Counter(e.gold for e in made.of("own"))
    assert tasks["own"].numbers["majority_accuracy"] == max(places.values()) / 8
    assert "macro_f1" not in tasks["own"].numbers  # no label is common to its queries
    assert tasks["many"].numbers["random_precision_at_10"] == pytest.approx(10 / 12)
    assert tasks["free"].numbers["majority_exact_match"] == 1 / 4
    assert "accuracy" not in tasks["free"].numbers


def test_a_teacher_agrees_with_its_own_cache(made: Made, teacher: PreTrainedModel) -> None:
    tasks = measured_tasks(made, teacher, "candidate_scores", "subset_preferences")
    assert set(tasks) == {"kinds", "own", "many"}
    for task in tasks.values():
        numbers = task.numbers
        assert numbers["candidate_kl"] == pytest.approx(0.0, abs=1e-6)
        assert numbers["candidate_agreement"] == 1.0
        assert numbers["best_subset_agreement"] == numbers["worst_subset_agreement"] == 1.0
        assert numbers["subset_rank_correlation"] == 1.0
        assert numbers["random_subset_agreement"] == 1 / len(SUBSETS)
        own = {name: value for name, value in numbers.items() if f"teacher_{name}" in numbers}
        assert len(own) >= 2
        assert own == {name: numbers[f"teacher_{name}"] for name in own}


def test_agreement_of_a_student_is_that_of_slow_scores(
    made: Made, student: PreTrainedModel
) -> None:
    by_subset = measured_tasks(made, student, "subset_preferences")
    by_candidate = measured_tasks(made, student, "candidate_scores")
    ours, theirs = made.slow[made.student], made.slow[made.teacher]
    assert set(by_subset) == {"kinds", "own", "many", "free"}
    for name, task in by_subset.items():
        best = [first_best(ours.subsets(e)) == first_best(theirs.subsets(e)) for e in made.of(name)]
        assert task.numbers["best_subset_agreement"] == pytest.approx(statistics.mean(best))
    kls, agreed = [], []
    for episode in made.of("kinds"):
        lengths_N = torch.as_tensor(episode.candidate_lengths_N)
        q_N, p_N = (
            (torch.tensor(slow.candidates(episode)) / lengths_N).log_softmax(0)
            for slow in (ours, theirs)
        )
        kls.append(float((p_N.exp() * (p_N - q_N)).sum()))
        agreed.append(bool(p_N.argmax() == q_N.argmax()))
    numbers = by_candidate["kinds"].numbers
    assert numbers["candidate_kl"] == pytest.approx(statistics.mean(kls), abs=1e-4)
    assert numbers["candidate_agreement"] == pytest.approx(statistics.mean(agreed))
    assert numbers["candidate_kl"] > 0.01


@pytest.mark.parametrize("tables", [("subset_preferences",), ("candidate_scores",)])
def test_rows_are_each_episode_by_itself(
    made: Made, student: PreTrainedModel, tables: tuple[str, ...]
) -> None:
    """Right by slow scores, log P of the gold, and means over rows that are the tasks' numbers."""
    dataset = open_dataset(made.tables(*tables))
    report = measure_episodes(student, dataset, IclOptions(tokenizer=made.teacher))
    of = {episode.sample_id: episode for episode in made.episodes}
    expected_ids = {dataset[index]["sample_id"] for index in range(len(dataset))}
    assert {row["sample_id"] for row in report.rows} == expected_ids
    for row in report.rows:
        episode = of[row["sample_id"]]
        assert (row["task"], row["draw"]) == (episode.task, episode.draw)
        if episode.gold < 0:
            assert "right" not in row and row["exact_match"] in (True, False)
            continue
        scores_N = np.array(slow_scores(made, episode, "mean"))
        assert row["right"] == (first_best(list(scores_N)) == episode.gold)
        expected = scores_N[episode.gold] - np.log(np.exp(scores_N).sum())
        assert row["gold_logprob"] == pytest.approx(expected, abs=1e-4)
    for task in report.tasks:
        own = [row for row in report.rows if row["task"] == task.task]
        for name in ("candidate_kl", "best_subset_agreement", "subset_rank_correlation"):
            known = [row[name] for row in own if row.get(name) is not None]
            mean = pytest.approx(statistics.mean(known)) if known else None
            assert task.numbers.get(name) == mean


def test_a_summary_is_the_mean_of_tasks(made: Made, student: PreTrainedModel) -> None:
    report = measure_episodes(student.train(), open_dataset(made.tables("candidate_scores")))
    assert student.training
    assert report.num_missing == 8 and report.num_left_out == 0
    summary = report.summary()
    for name in ("accuracy", "majority_accuracy", "random_accuracy", "candidate_kl"):
        assert summary[name] == pytest.approx(np.mean([t.numbers[name] for t in report.tasks]))
    assert summary["num_tasks"] == 3 and summary["num_episodes"] == 29
    assert "accuracy_deviation" not in summary  # task `many` has one draw
    without = replace(report, tasks=tuple(t for t in report.tasks if t.task != "many"))
    by_draw = [[t.accuracy_by_draw[draw] for t in without.tasks] for draw in (0, 1)]
    expected = statistics.stdev(statistics.mean(part) for part in by_draw)
    assert without.summary()["accuracy_deviation"] == pytest.approx(expected)
    assert all(isinstance(value, int | float) for value in summary.values())


def test_without_a_tokenizer_free_answers_are_left_out_and_counted(
    made: Made, student: PreTrainedModel
) -> None:
    report = measure_episodes(student, open_dataset(made.tables()))
    assert report.num_left_out == 8
    assert {task.task for task in report.tasks} == {"kinds", "own", "many"}


def test_other_tables_and_draws_that_do_not_belong_together_are_refused(
    made: Made, student: PreTrainedModel, tmp_path: Path
) -> None:
    document = Document(sample_id="0" * 24, split="heldout", input_ids_T=np.array([1, 2]))
    write_table(
        tmp_path / "documents", DOCUMENTS.bind(vocab_size=VOCAB_SIZE), [document], made.teacher
    )
    with pytest.raises(ConfigError, match="is table documents, expected episodes first"):
        measure_episodes(student, open_dataset([tmp_path / "documents"]))
    first, second = (e for e in made.episodes if e.query_id == "kinds 0" and e.draw < 2)
    other = replace(second, gold=(second.gold + 1) % 4)
    bound = EPISODES.bind(vocab_size=VOCAB_SIZE)
    write_table(tmp_path / "mixed", bound, [first, other], made.teacher)
    with pytest.raises(StoreError, match=r"draws of one query \(kinds 0\)"):
        measure_episodes(student, open_dataset([tmp_path / "mixed"]))


def test_a_student_of_another_name_makes_the_report_anew() -> None:
    """A report names its students: one from the cache would say the names they had."""
    stages = [
        EvaluateStage(stage="evaluate", students=students, data=("episodes",))
        for students in (("before", "after"), ("before", "best"), ("before", "after"))
    ]
    first, renamed, again = (stage.hashed() for stage in stages)
    assert first == again and first != renamed


def test_the_command_prints_a_table_and_json(made: Made) -> None:
    tables = made.tables("candidate_scores", "subset_preferences", "teacher_logits")
    data = [word for folder in tables for word in ("--data", str(folder))]
    said = teachercache("evaluate", made.teacher, *data, "--score", "sum", "--json")
    assert said.code == 0, said.err
    body = json.loads(said.out)
    assert body["scoring"] == "sum" and [t["task"] for t in body["tasks"]] == [
        "kinds",
        "many",
        "own",
    ]
    overall = body["overall"]
    assert overall["candidate_agreement"] == 1.0
    assert overall["top1_agreement"] == 1.0 and abs(overall["kl_to_teacher"]) < 0.01
    shown = teachercache("evaluate", made.teacher, *data)
    for words in ("mean of tasks", "majority", "random", "tau-b", "every scored position"):
        assert words in shown.out, shown.out
    assert "8 episodes left out" in shown.out
    alone = teachercache("evaluate", made.student, "--data", str(made.root / "episodes"))
    assert alone.code == 0 and "exact match" in alone.out and "teacher" not in alone.out
    wrong = teachercache("evaluate", made.student, *data, "--score", "median")
    assert wrong.code == 2
