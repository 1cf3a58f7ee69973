"""The page of the in-context experiments: what was found, as results say it, and its figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bars import markdown_table
from benchmarks.methods.icl_recipes import METHODS, START
from benchmarks.methods.paired import FAILS, UNKNOWN, plot_intervals, said, save_figure

PAGE = """# In-context learning in a small world: BiAlign and ICL-D against their baselines

Written by `python benchmarks/methods/icl.py --folder FOLDER --docs docs/methods`, {minutes:.0f}
minutes of processor time; every row is made by `teachercache run FOLDER/seed_N.yaml`.

The world: {classes} latent classes of words; a task gives {labels} of them a label each, anew, so
what a phrase's label is stands in the demonstrations alone. The teacher ({teacher_size:.2f} M
parameters) was trained from nothing on {corpus:,} texts; students ({student_size:.2f} M) begin at
`{start}`, {start_steps} steps of the same training. From there each method has {steps} steps of
{batch} episodes, out of {train:,} of {tasks} tasks (Multitask-ICT: {multi:,} of the judged tasks'
own support examples). Judged on {episodes:,} episodes of 8 demonstrations of {judged} tasks that
neither has seen, {seeds} seeds: a student's weights, its start and the order of its rows.

{table}

Effects are differences of accuracy on the same seed and episode, with 95 % intervals over new seeds
and new episodes (`benchmarks/methods/paired.py`). "Equal compute" is three times the steps: a step
of BiAlign has the student read an episode and four subsets of its demonstrations as well.

![accuracies and effects](evidence_icl.png)

{accuracies}

Learning rates were searched for every method alike, among {rates}, on a seed and {tuning} tasks of
their own; what was best there was taken. Rank agreement (tau-b) is on those tasks.

{findings}
"""


def write_docs(folder: Path, results: Mapping[str, Any]) -> None:
    """Write ``evidence_icl.md`` and its figure."""
    folder.mkdir(parents=True, exist_ok=True)
    plot(folder / "evidence_icl.png", results)
    effects = [
        {
            "paper": row["paper"],
            "claim": row["claim"],
            "accuracy": f"{row['method']:.3f}, baseline {row['baseline']:.3f}",
            "effect": said((row["effect"], row["low"], row["high"]), 3),
            "verdict": row["verdict"],
        }
        for row in results["rows"]
    ]
    accuracies = [
        {
            "student": METHODS[name].said if name in METHODS else name,
            "accuracy": f"{value:.3f}",
            "log P of gold": _given(results["gold_logprob"], name),
            "tau-b of subsets": _given(results["subset_correlation"], name),
            "tokens read a step": _given(results["tokens"], name, "{:,.0f}"),
            "rate": _given(results["rates"], name, "{:g}"),
        }
        for name, value in results["accuracy"].items()
    ]
    page = PAGE.format(
        **results["world"],
        minutes=results["processor_minutes"],
        start=START,
        table=markdown_table(effects),
        accuracies=markdown_table(accuracies),
        findings="\n".join(findings(results)),
    )
    (folder / "evidence_icl.md").write_text(page)


def plot(path: Path, results: Mapping[str, Any]) -> None:
    """Draw the accuracies of all students beside the effects."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    accuracy = dict(results["accuracy"])
    names = [METHODS[name].said if name in METHODS else name for name in accuracy]
    left.barh(range(len(names)), list(accuracy.values()), color="#729fcf")
    left.set_yticks(range(len(names)), names)
    left.axvline(results["chance"], color="black", linewidth=0.8, linestyle="--")
    left.set_xlabel("accuracy on held-out episodes (dashed: chance)")
    left.invert_yaxis()
    intervals = {
        f"{row['paper']}: {row['claim']}": (row["effect"], row["low"], row["high"])
        for row in results["rows"]
    }
    plot_intervals(right, intervals, "difference of accuracy, 95 % interval")
    save_figure(figure, path)


def findings(results: Mapping[str, Any]) -> list[str]:
    """Say in a line each what the numbers say, whatever they are."""
    lines = []
    for row in results["rows"]:
        effect = said((row["effect"], row["low"], row["high"]), 3)
        if row["verdict"] in (FAILS, UNKNOWN):
            lines.append(f"- {row['claim']}: {row['verdict']}, {effect}.")
    return lines


def _given(values: Mapping[str, float], name: str, form: str = "{:.3f}") -> str:
    return form.format(values[name]) if name in values else ""
