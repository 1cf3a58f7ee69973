"""An evaluation of distillers as a person reads it: a row each, and one for what stands beside."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from stages.student.evaluate.stage import BESIDE, BEYOND_WINDOW, POSITIONS, WITHOUT_SHOTS

# Header and name of a number; one that nothing has is left out.
COLUMNS = (
    ("positions before the query", POSITIONS),
    ("KL to teacher", "kl_to_teacher"),
    ("top-1 agreement", "top1_agreement"),
    ("cross-entropy", "cross_entropy"),
    ("cross-entropy of answers", "answer_cross_entropy"),
    ("accuracy", "accuracy"),
    ("macro-F1", "macro_f1"),
    ("accuracy of the vote", "vote_accuracy"),
    ("P@1", "precision_at_1"),
    ("P@10", "precision_at_10"),
)
GUESSES = ("majority", "random")
REMARKS = {
    BEYOND_WINDOW: "rows are left out: the reader has no room for what is before the query and "
    "the longest answer",
    WITHOUT_SHOTS: "rows read no demonstration: the first has more tokens than there are vectors",
}

Measured = Mapping[str, Mapping[str, float]]


def vectors_report(
    measured: Measured, students: Sequence[str], title: str
) -> Iterator[RenderableType]:
    """Yield the table of ``students`` and what stands beside them, then a line for what is left
    out.
    """
    label = " (cross_model)" if measured[students[0]].get("cross_model") else ""
    known = [
        (header, name)
        for header, name in COLUMNS
        if any(name in numbers for numbers in measured.values())
    ]
    table = Table(title=f"{title}{label}")
    for header in ("", *(header for header, _ in known)):
        table.add_column(header, no_wrap=not header)  # names are read whole
    names = [*students, *BESIDE]
    for name in names:
        table.add_row(name, *(_cell(measured[name], column) for _, column in known))
    for guess in GUESSES:
        cells = [_cell(measured[students[0]], f"{guess}_{column}") for _, column in known]
        if set(cells) != {"-"}:
            table.add_row(f"({guess})", *cells)
    yield table
    for name in names:
        for count, why in REMARKS.items():
            if number := measured[name].get(count):
                yield Text(f"{name}: {number:.0f} {why}")


def _cell(numbers: Mapping[str, float], name: str) -> str:
    if name not in numbers:
        return "-"
    return f"{numbers[name]:.1f}" if name == POSITIONS else f"{numbers[name]:.3f}"
