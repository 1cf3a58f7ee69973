"""An in-context evaluation as a person reads it: one row a task, baselines and teacher beside.

In brackets stands the standard deviation over draws of demonstrations. A mean "of 2" is over the
two tasks that have such a number.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from stages.student.evaluate.icl import IclReport

# Header and name of a number; a column that no task has is left out.
Columns = Sequence[tuple[str, str]]
CHOSEN: Columns = (
    ("accuracy", "accuracy"),
    ("vote", "vote_accuracy"),
    ("macro-F1", "macro_f1"),
    ("majority", "majority_accuracy"),
    ("majority macro-F1", "majority_macro_f1"),
    ("random", "random_accuracy"),
    ("teacher", "teacher_accuracy"),
    ("teacher macro-F1", "teacher_macro_f1"),
)
PRECISION: Columns = (
    ("P@1", "precision_at_1"),
    ("P@10", "precision_at_10"),
    ("random P@10", "random_precision_at_10"),
    ("teacher P@1", "teacher_precision_at_1"),
    ("teacher P@10", "teacher_precision_at_10"),
)
FREE: Columns = (
    ("exact match", "exact_match"),
    ("word F1", "token_f1"),
    ("majority exact match", "majority_exact_match"),
)
AGREEMENT: Columns = (
    ("KL of candidates", "candidate_kl"),
    ("same candidate", "candidate_agreement"),
    ("same best subset", "best_subset_agreement"),
    ("same worst subset", "worst_subset_agreement"),
    ("random best", "random_subset_agreement"),
    ("tau-b of subsets", "subset_rank_correlation"),
)
POSITIONS: Columns = (
    ("cross-entropy", "cross_entropy"),
    ("KL to teacher", "kl_to_teacher"),
    ("top-1 agreement", "top1_agreement"),
)


def print_icl_report(console: Console, student: str, report: "IclReport", *, as_json: bool) -> None:
    """Show the numbers of one evaluation on episodes."""
    if as_json:
        console.print_json(json.dumps({"student": student, **report.as_dict()}))
        return
    console.print(student, highlight=False, soft_wrap=True)
    titles = {
        f"answers chosen by {report.scoring} log-prob": CHOSEN,
        "answers chosen among more than 10": PRECISION,
        "free answers": FREE,
        "agreement with the teacher": AGREEMENT,
    }
    for title, columns in titles.items():
        table = _table(report, columns, title)
        if table is not None:
            console.print(table)
    if report.positions:
        known = [(header, name) for header, name in POSITIONS if name in report.positions]
        table = _empty("every scored position", [header for header, _ in known])
        table.add_row(*(_cell(report.positions, name) for _, name in known))
        console.print(table)
    for count, why in (
        (report.num_missing, "episodes left out: some table given has no row for them"),
        (report.num_left_out, "free answers left out: no tokenizer was given"),
    ):
        if count:
            console.print(f"{count} {why}", highlight=False)


def _table(report: "IclReport", columns: Columns, title: str) -> Table | None:
    """Return the tasks that have any of ``columns``, then the mean over them."""
    tasks = [task for task in report.tasks if any(name in task.numbers for _, name in columns)]
    if not tasks:
        return None
    overall = report.summary()
    known = [(header, name) for header, name in columns if name in overall]
    table = _empty(title, ["task", "queries x draws", *(header for header, _ in known)])
    for task in tasks:
        cells = (_cell(task.numbers, name) for _, name in known)
        table.add_row(task.task, f"{task.num_queries} x {task.num_draws}", *cells)
    if len(tasks) > 1:
        table.add_section()
        counts = {name: sum(name in task.numbers for task in tasks) for _, name in known}
        means = (
            _cell(overall, name) + ("" if count == len(tasks) else f" of {count}")
            for name, count in counts.items()
        )
        table.add_row("mean of tasks", "", *means)
    return table


def _empty(title: str, headers: Sequence[str]) -> Table:
    """Return a table without frames: task names need the room."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(header, overflow="fold", no_wrap=index == 0)
    return table


def _cell(numbers: Mapping[str, float], name: str) -> str:
    """Return a number, and a student's with its deviation over draws."""
    if name not in numbers:
        return "-"
    deviation = None if name.startswith("teacher") else numbers.get(f"{name}_deviation")
    return f"{numbers[name]:.3f}" + ("" if deviation is None else f" ({deviation:.2f})")
