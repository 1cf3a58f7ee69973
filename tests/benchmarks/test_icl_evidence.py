"""The in-context experiments: their world, what they compare, the quick run as a whole."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.methods import icl
from benchmarks.methods.in_context import search
from benchmarks.methods.in_context.claims import CLAIMS, JUDGED, ON_NOVEL, effects
from benchmarks.methods.in_context.methods import GRID, METHODS, RATES, step_name
from benchmarks.methods.in_context.world import (
    FIRST,
    KINDS,
    LABELS_A_TASK,
    NOVEL,
    READ,
    World,
    vocabulary,
)
from benchmarks.methods.paired import paired_interval


def class_of(word: str) -> int | None:
    """The class of a word; None of a filler."""
    return None if word.startswith("filler") else ord(word[0]) - ord("a")


def test_no_task_comes_twice_and_labels_are_those_of_the_patterns() -> None:
    world = World(seed=1)
    tasks, more = world.new_tasks(40), world.new_tasks(40)
    assert len({task for found in (tasks, more) for of in found.values() for task in of}) == 240
    rows = world.task_rows(tasks, "a", 20)
    assert len(rows) == 20 * 40 * len(KINDS) and set(tasks) == set(KINDS)
    assert len({(row["task"], row["input"]) for row in rows}) == len(rows)  # no phrase comes twice
    known = vocabulary()
    for row in rows:
        _, kind, number = row["task"].split("_")
        first, second = row["input"].split()
        assert {first, second, row["output"]} <= set(known)
        label = dict(tasks[kind][int(number)])[class_of(first), class_of(second)]
        assert row["output"] == f"label{label}"
        assert len(set(row["options"])) == LABELS_A_TASK and row["output"] in row["options"]


def test_kinds_differ_in_what_their_patterns_tell() -> None:
    tasks = World(seed=1).new_tasks(5, NOVEL)
    for kind, of_kind in tasks.items():
        for task in of_kind:
            patterns = [pattern for pattern, _ in task]
            classes = {class_ for pattern in patterns for class_ in pattern} - {None}
            assert classes <= set(NOVEL) and len(set(patterns)) == LABELS_A_TASK
            assert len(classes) == (LABELS_A_TASK if kind == "maps" else 2)
            if kind == "maps":  # the last word tells, alone
                assert len({last for _, last in patterns}) == LABELS_A_TASK
            else:  # neither word does
                assert all(len(set(place)) < LABELS_A_TASK for place in zip(*patterns, strict=True))


def test_a_corpus_teaches_the_labels_of_episodes_alone() -> None:
    world, names = World(seed=4), list(vocabulary())
    corpus = list(world.corpus(400, 64, FIRST, READ))
    episodes = 0
    for ids, learned in corpus:
        assert len(ids) == len(learned) == 64
        if all(learned):  # a repetition, or running text
            continue
        episodes += 1
        said = [names[id_] for id_ in ids]
        assert [word.startswith("label") for word in said] == [bool(one) for one in learned]
        classes = {word[0] for word in said if word[1:].isdigit()}
        assert classes <= {chr(ord("a") + class_) for class_ in FIRST}
    assert 0.5 < episodes / len(corpus) < 0.7


def test_no_episode_of_a_corpus_has_a_task_of_the_files() -> None:
    """A quarter of the maps that four classes can have is in the files: so many would come up."""
    classes, names = range(LABELS_A_TASK), list(vocabulary())
    world = World(seed=5)
    of_files = [
        {class_: f"label{label}" for (_, class_), label in task}
        for task in world.new_tasks(420, classes)["maps"]
    ]
    episodes = 0
    for ids, learned in world.corpus(400, 100, classes, READ):
        said = [names[id_] for id_ in ids]
        labels = {class_of(said[at - 1]): said[at] for at, one in enumerate(learned) if one}
        if all(learned) or len(labels) < LABELS_A_TASK:  # no episode, or of another kind
            continue
        episodes += 1
        assert labels not in of_files
    assert episodes > 50


def test_so_many_answers_are_wrong_and_are_other_options() -> None:
    world = World(seed=2)
    rows = world.task_rows(world.new_tasks(20), "a", 50)
    noisy = world.with_wrong_answers(rows, 0.2)
    wrong = [row for row, right in zip(noisy, rows, strict=True) if row != right]
    assert 0.15 < len(wrong) / len(rows) < 0.25
    for row, right in zip(noisy, rows, strict=True):
        assert row["output"] in row["options"] and row["input"] == right["input"]


def test_effects_are_paired_and_judged() -> None:
    """A method right wherever its baseline is and on a tenth more: +0.1, whatever is hard."""
    rng = np.random.default_rng(0)
    hard_SE = np.tile(rng.random(500) < 0.5, (4, 1))
    more_SE = hard_SE | (rng.random((4, 500)) < 0.2)
    students = {claim.method for claim in CLAIMS} | {claim.baseline for claim in CLAIMS}
    right_SE = dict.fromkeys(students, hard_SE.astype(float)) | {"bialign": more_SE.astype(float)}
    right = {JUDGED: right_SE, ON_NOVEL: dict.fromkeys(students, hard_SE.astype(float))}
    task_of_E = np.repeat(np.arange(50), 10)
    rows = {row["claim"]: row for row in effects(right, task_of_E)}
    won = rows["BiAlign beats output alignment"]
    assert won["effect"] == pytest.approx(more_SE.mean() - hard_SE.mean())
    assert won["low"] < won["effect"] < won["high"] and won["verdict"] == "holds"
    assert won["over_tasks"] == paired_interval(more_SE * 1.0 - hard_SE, task_of_E)
    assert won["verdict_over_tasks"] == "holds"
    assert won["novel"] == (0.0, 0.0, 0.0)
    assert rows["Meta-ICT: ICL-D beats tuning"]["verdict"] == "cannot be told"
    # the same answers are at most 0.02 worse
    assert rows["at most 0.02 worse than all demonstrations"]["verdict"] == "holds"


def test_the_search_takes_each_methods_own_best_rate() -> None:
    low, high = RATES[0], RATES[-1]
    found = {step_name(name, rate): [0.5] for name in METHODS for rate in RATES}
    found[step_name("bialign", high)] = [0.6]
    assert search.best_rate("bialign", found) == high
    assert search.best_rate("tuned", found) == low


def test_the_search_goes_on_beside_the_best_rate() -> None:
    low, high = RATES
    above, far_above = GRID[GRID.index(high) + 1 :][:2]
    found = {step_name("tuned", low): [0.5], step_name("tuned", high): [0.6]}
    assert search.untried_beside("tuned", found) == [above]
    found[step_name("tuned", above)] = [0.7]
    assert search.untried_beside("tuned", found) == [far_above]
    found[step_name("tuned", far_above)] = [0.6]
    assert not search.untried_beside("tuned", found)
    found[step_name("tuned", GRID[0])] = [0.8]  # the grid ends there
    assert search.untried_beside("tuned", found) == [GRID[1]]


def test_rates_that_one_seed_cannot_tell_apart_are_judged_by_their_mean() -> None:
    low, high = RATES
    found = {step_name("tuned", low): [0.69], step_name("tuned", high): [0.70]}
    found[step_name("tuned", GRID[-1])] = [0.66]
    assert search.near_best("tuned", found) == [low, high]
    for rate, accuracy in ((low, 0.71), (high, 0.60)):
        found[step_name("tuned", rate)].append(accuracy)
    assert search.best_rate("tuned", found) == low


@pytest.mark.slow
def test_quick_run_makes_every_row_and_writes_the_page(tmp_path: Path) -> None:
    results, docs = tmp_path / "bars.json", tmp_path / "docs"
    folder = tmp_path / "benchmarks" / "icl-quick"
    arguments = ["--quick", "--cache", str(tmp_path), "--docs", str(docs)]
    assert icl.main([*arguments, "--json", str(results)]) == 0
    body = json.loads(results.read_text())
    assert len(body["rows"]) == len(CLAIMS)
    found = json.loads((folder / "results.json").read_text())
    beside = {"zero-shot", "random vectors", "mean pooling", "fewer shots", "all demonstrations"}
    assert set(found["accuracy"]) == {"start", "teacher", "mend", *METHODS} | beside
    # what the reader answers after all demonstrations is the teacher's own answer
    of_all, teacher = found["accuracy"]["all demonstrations"], found["accuracy"]["teacher"]
    assert of_all == pytest.approx(teacher)
    page = (docs / "evidence_icl.md").read_text()
    assert "this decides nothing" in page
    for claim in CLAIMS:
        assert claim.said in page
    assert (docs / "evidence_icl.png").stat().st_size > 10_000
