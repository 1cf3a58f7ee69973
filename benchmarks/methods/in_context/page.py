"""The page of the in-context experiments: what was found, as results say it, and its figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bars import markdown_table, written_by
from benchmarks.methods.in_context.methods import MEND, METHODS, START
from benchmarks.methods.in_context.world import KINDS
from benchmarks.methods.paired import Interval, plot_intervals, said, save_figure

PAGE = """# In-context learning in a small world: BiAlign, ICL-D and MEND against their baselines

{written_by} Every row is made by
`teachercache run CACHE/benchmarks/icl/seed_N.yaml`, those of MEND by `mend.yaml` there.

The world: a task gives each of {labels} patterns of two words a label, anew, so what a phrase's
label is stands in its demonstrations alone. Words are of latent classes; a third of the tasks are
`maps` (a class, after a filler), a third `relations` (of two classes, which stands before which, or
one twice), a third `orders` (of two classes, which one, and whether before a filler or after).

The teacher ({teacher_size:.2f} M parameters) was trained from nothing on {corpus:,} rows of such
tasks, repetitions and running text; students ({student_size:.2f} M) begin at `{start}`,
{start_steps:,} steps of the same, with tasks of {first_classes} of the classes alone. From there
each method has {steps} steps of {batch} episodes, out of {train:,} of {tasks} tasks of {classes}
classes (Multitask-ICT: {multi:,} of the judged tasks' own support examples); of the {new} classes
that the start has no task of it has no text either. Judged on {judged_episodes:,} episodes of
{shown} demonstrations, of {judged} tasks of these classes that are not among the training
tasks, and on {novel_episodes:,} of {novel} tasks of {novel_classes} novel classes, which students
know from running text alone. {seeds} seeds: the order of a method's rows. Teacher and start are one
each, as in the papers; intervals say nothing of other starts.

{table}

Effects are differences of accuracy on the same seed and episode, with 95 % intervals over new seeds
and new episodes of these tasks, or over new seeds and new tasks of these classes, whose episodes
are drawn together (`benchmarks/methods/paired.py`); verdicts are of the first column of intervals,
and of the second where that tells otherwise. "Equal compute" is three times the steps: a step of
BiAlign has the student read four subsets of an episode's demonstrations as well, one with the LM
term a row of running text. Of noisy answers, in the demonstrations of training tasks too,
{wrong:.0%} are another label of the task. Clear pairs are subsets whose scores by the teacher are
more than {tie:g} nats apart, not 0.001, the default.

![accuracies and effects](evidence_icl.png)

{accuracies}

Learning rates were searched for every method alike, on a seed and {tuning} tasks of their own:
{rates}, then what lies beside a method's best until all of that was tried; rates within {near:g} of
the best one's accuracy were tried on two more seeds, and the best mean was taken. Rank agreement
(tau-b) is on those tasks. MEND's rows are the teacher's own answers after what is named; its
distiller ({vectors} vectors; {distiller_steps} steps of the two stages) was not searched.
"""


def write_docs(folder: Path, results: Mapping[str, Any], *, quick: bool) -> None:
    """Write ``evidence_icl.md`` and its figure."""
    folder.mkdir(parents=True, exist_ok=True)
    plot(folder / "evidence_icl.png", results)
    effects = [
        {
            "paper": row["paper"],
            "claim": row["claim"],
            "accuracy": f"{row['method']:.3f}, baseline {row['baseline']:.3f}",
            "effect": said((row["effect"], row["low"], row["high"]), 3),
            "over new tasks": _bounds(row["over_tasks"]),
            "effect, novel classes": said(row["novel"], 3),
            "verdict": _both_verdicts(row),
        }
        for row in results["rows"]
    ]
    accuracies = [
        {
            "student": _label(name),
            "accuracy": f"{value['judged']:.3f}",
            **{kind: f"{value[kind]:.3f}" for kind in KINDS},
            "novel classes": f"{value['novel']:.3f}",
            "log P of gold": _given(results["gold_logprob"], name),
            "tau-b of subsets": _given(results["subset_correlation"], name),
            "tokens read a step": _given(results["tokens"], name, "{:,.0f}"),
            "rate": _given(results["rates"], name, "{:g}"),
        }
        for name, value in results["accuracy"].items()
    ]
    page = PAGE.format(
        written_by=written_by("benchmarks/methods/icl.py", quick=quick),
        **results["world"],
        start=START,
        table=markdown_table(effects),
        accuracies=markdown_table(accuracies),
    )
    (folder / "evidence_icl.md").write_text(page)


def plot(path: Path, results: Mapping[str, Any]) -> None:
    """Draw the accuracies of all students beside the effects."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 7))
    accuracy = {name: value["judged"] for name, value in results["accuracy"].items()}
    names = [_label(name) for name in accuracy]
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


def _label(name: str) -> str:
    if name == MEND:
        return "MEND, vectors"
    return METHODS[name].said if name in METHODS else name


def _bounds(interval: Interval) -> str:
    return said(interval, 3).partition(" ")[2]


def _both_verdicts(row: Mapping[str, Any]) -> str:
    verdict, over_tasks = row["verdict"], row["verdict_over_tasks"]
    return verdict if verdict == over_tasks else f"{verdict}; over new tasks {over_tasks}"


def _given(values: Mapping[str, float], name: str, form: str = "{:.3f}") -> str:
    return form.format(values[name]) if name in values else ""
