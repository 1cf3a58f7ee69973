"""The page of a run: every step of a recipe looked at, put into one HTML file.

The file needs nothing else: no network, no other file. What data say is never markup: the template
escapes it, and the page's script sets it as text. A Content-Security-Policy in the page lets no
script or style in but the file's own, and nothing be fetched.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.planning.plan import PlannedStep, needs
from pipeline.planning.recipe import Recipe
from pipeline.reports.cells import human_bytes
from pipeline.reports.page.break_even import BreakEven, break_evens
from pipeline.reports.page.charts import curves
from pipeline.reports.page.plan_graph import BOX_HEIGHT, BOX_WIDTH, draw
from pipeline.reports.page.sampled_rows import READ_ERRORS
from pipeline.reports.page.students import Chart, Students, students_of
from pipeline.reports.page.table_section import TableSection, table_section
from pipeline.reports.page.words import Tokenizers
from pipeline.state.step_state import finished_manifest, progress_of
from schemas.errors import first_line
from schemas.storage.files import Folder, write_text

REPORTS = "reports"  # a folder of the root
_ESCAPED = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


@dataclass(frozen=True, slots=True)
class StepLine:
    """A step in the plan's drawing and in its table; of one that is damaged ``why`` says it."""

    name: str
    stage: str
    models: str
    state: str
    why: str
    shards: str
    rows: str
    size: str
    seconds: str
    place: str
    fingerprint: str
    needs: tuple[str, ...]


def default_place(recipe: Recipe) -> Folder:
    """Return where a recipe's page lies if nobody says: below its root, by the recipe's name."""
    return recipe.execution.root / REPORTS / f"{recipe.name}.html"


def write_page(recipe: Recipe, steps: Sequence[PlannedStep], place: Folder) -> None:
    """Write the page of a recipe, finished or not; raises StoreError where it cannot be written."""
    write_text(place, page_of(recipe, steps))


def page_of(recipe: Recipe, steps: Sequence[PlannedStep]) -> str:
    """Return the page's HTML. A step that is damaged is shown as that and stops nothing."""
    tokenizers = Tokenizers(steps)
    sections: dict[str, TableSection] = {}
    problems: dict[str, str] = {}
    for step in steps:
        try:
            manifest = finished_manifest(step) if step.writes_table else None
            if manifest is not None:
                source = _source_of(steps, step)
                sections[step.name] = table_section(step, manifest, source, tokenizers)
        except READ_ERRORS as error:
            problems[step.name] = first_line(error)
    students = students_of(steps)
    signals = {name: section.signal for name, section in sections.items()}
    costs = break_evens(steps, signals, students.rows_read)
    lines = [_step_line(steps, step, sections, students, problems) for step in steps]
    return _filled(recipe, lines, sections, students, costs)


def _source_of(steps: Sequence[PlannedStep], step: PlannedStep) -> PlannedStep | None:
    """Return the step whose rows a table's are about; of a table made elsewhere by its name."""
    if step.inputs:
        return step.inputs[0] if step.kind == "table" else None
    made_of = step.identity.get("inputs") or [None]
    return next((other for other in steps if other.fingerprint == made_of[0]), None)


def _step_line(
    steps: Sequence[PlannedStep],
    step: PlannedStep,
    sections: Mapping[str, TableSection],
    students: Students,
    problems: Mapping[str, str],
) -> StepLine:
    state, why, shards, rows, size = "damaged", problems.get(step.name, ""), "", "", ""
    try:
        progress = progress_of(step)
    except READ_ERRORS as error:
        why = first_line(error)
    else:
        about = "about " if progress.estimated else ""
        if not why:
            state, why = progress.state, progress.why
        if step.writes_table and progress.num_shards is not None:
            shards = f"{progress.shards_done}/{progress.num_shards}"
        rows = "" if progress.num_rows is None else f"{progress.num_rows:,}"
        size = "" if progress.num_bytes is None else about + human_bytes(progress.num_bytes)
    section = sections.get(step.name)
    seconds = students.seconds.get(step.name)
    if section is not None:
        seconds = _all_seconds(section)
    return StepLine(
        step.name,
        step.stage.stage,
        ", ".join(step.models),
        state,
        why,
        shards,
        rows,
        size,
        "" if seconds is None else human_seconds(seconds),
        str(step.place),
        step.fingerprint,
        tuple(other.name for other in needs(steps, step)),
    )


def _all_seconds(section: TableSection) -> float | None:
    """Return the seconds of all shards; of many shards, as those that were looked at foretell."""
    made = section.made
    if made.seconds is None or not made.num_shards:
        return None
    return made.seconds / made.num_shards * len(section.manifest.shards)


def human_seconds(seconds: float) -> str:
    """Return a time with its largest fitting unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


def json_text(value: Any) -> str:
    """Return JSON that ends no ``<script>`` and begins no markup, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPED)


def _filled(
    recipe: Recipe,
    lines: Sequence[StepLine],
    sections: Mapping[str, TableSection],
    students: Students,
    costs: Sequence[BreakEven],
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": human_bytes, "seconds": human_seconds, "drawn": Markup}
    style, script = _asset("page.css"), _asset("page.js")
    samples = {name: section.samples for name, section in sections.items() if section.samples}
    html = environment.get_template("page.html").render(
        recipe=recipe,
        version=version("teachercache"),
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        steps=lines,
        graph=draw({line.name: line.needs for line in lines}),
        box=(BOX_WIDTH, BOX_HEIGHT),
        sections=list(sections.values()),
        students=students,
        costs=costs,
        cost_charts=[_cost_chart(cost) for cost in costs if not cost.missing],
        samples=Markup(json_text(samples)),
    )
    return html.strip() + "\n"


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _cost_chart(cost: BreakEven) -> Chart:
    """Return what N runs cost with the cache and with a live teacher, by N."""
    last = max(4, round(2 * (cost.runs or 2)))
    by_series = {"cached": (cost.capture_s, cost.reading_s), "live teacher": (0.0, cost.live_s)}
    runs = sorted({round(i * last / 8) for i in range(9)})
    points: list[dict[str, Any]] = [
        {"x": n, "y": start + n * each, "series": series}
        for series, (start, each) in by_series.items()
        for n in runs
    ]
    about = f"Seconds of teacher and reading by student runs, {cost.student}"
    svg = curves(points, x="student runs", y="seconds", about=about)
    rows = [(p["series"], f"{p['x']}", f"{p['y']:.4g}") for p in points]
    return Chart(cost.student, svg, ("", "student runs", "seconds"), rows)
