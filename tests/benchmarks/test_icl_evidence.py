"""The in-context experiments: their world, what they compare, the quick run as a whole."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.methods import icl
from benchmarks.methods.in_context.claims import CLAIMS, JUDGED, ON_NOVEL, effects
from benchmarks.methods.in_context.methods import METHODS, RATES, step_name
from benchmarks.methods.in_context.world import LABELS_A_TASK, World, vocabulary


def test_no_phrase_and_no_task_comes_twice_and_labels_are_the_tasks() -> None:
    world = World(seed=1)
    tasks = world.new_tasks(40)
    assert len(set(tasks) | set(world.new_tasks(40))) == 80
    rows = [*world.task_rows(tasks, "a", 20), *world.task_rows(world.new_tasks(5), "b", 20)]
    assert max(Counter(row["input"] for row in rows).values()) == 1
    known = vocabulary()
    for row in rows[: 20 * len(tasks)]:
        task = dict(tasks[int(row["task"].removeprefix("a_"))])
        filler, word = row["input"].split()
        assert {filler, word, row["output"]} <= set(known)
        assert row["output"] == f"label{task[ord(word[0]) - ord('a')]}"
        assert len(set(row["options"])) == LABELS_A_TASK and row["output"] in row["options"]


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
    rows = {row["claim"]: row for row in effects(right)}
    won = rows["BiAlign beats output alignment"]
    assert won["effect"] == pytest.approx(more_SE.mean() - hard_SE.mean())
    assert won["low"] < won["effect"] < won["high"] and won["verdict"] == "holds"
    assert won["novel"] == (0.0, 0.0, 0.0)
    assert rows["Meta-ICT: ICL-D beats tuning"]["verdict"] == "cannot be told"
    # the same answers are at most 0.02 worse
    assert rows["at most 0.02 worse than all demonstrations"]["verdict"] == "holds"


def test_the_search_takes_each_methods_own_best_rate() -> None:
    low, high = RATES[0], RATES[-1]
    found = {step_name(name, rate): 0.5 for name in METHODS for rate in RATES}
    found[step_name("bialign", high)] = 0.6
    assert icl.best_rate("bialign", found) == high
    assert icl.best_rate("tuned", found) == low


@pytest.mark.slow
def test_quick_run_makes_every_row_and_writes_the_page(tmp_path: Path) -> None:
    results, docs = tmp_path / "bars.json", tmp_path / "docs"
    folder = tmp_path / "benchmarks" / "icl-quick"
    arguments = ["--quick", "--cache", str(tmp_path), "--docs", str(docs)]
    icl.main([*arguments, "--json", str(results)])  # its intervals are too wide for the bar
    body = json.loads(results.read_text())
    assert len(body["rows"]) == len(CLAIMS)
    found = json.loads((folder / "results.json").read_text())
    beside = {"zero-shot", "random vectors", "mean pooling", "fewer shots", "all demonstrations"}
    assert set(found["accuracy"]) == {"start", "teacher", "mend", *METHODS} | beside
    # what the reader answers after all demonstrations is the teacher's own answer
    of_all, teacher = found["accuracy"]["all demonstrations"], found["accuracy"]["teacher"]
    assert of_all == pytest.approx(teacher)
    page = (docs / "evidence_icl.md").read_text()
    for claim in CLAIMS:
        assert claim.said in page
    assert (docs / "evidence_icl.png").stat().st_size > 10_000
