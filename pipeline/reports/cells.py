"""What several tables for people have in their cells: counts, sizes, rejects."""

from pipeline.planning.plan import PlannedStep
from pipeline.state.step_state import finished_manifest


def rejects_cell(step: PlannedStep) -> str:
    """Return the rejected rows of a finished table by reason."""
    manifest = finished_manifest(step) if step.writes_table else None
    if manifest is None:
        return "-"
    return ", ".join(f"{count} {reason}" for reason, count in manifest.rejects.items()) or "0"


def count_cell(value: int | None) -> str:
    """Return a count with separators, ``-`` for one that is not known."""
    return "-" if value is None else f"{value:,}"


def human_bytes(size: float) -> str:
    """Return a size with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
