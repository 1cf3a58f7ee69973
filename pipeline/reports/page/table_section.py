"""What the page says of one table: its counts, its rejects, its verdict, its numbers, samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.planning.plan import PlannedStep
from pipeline.reports.page import token_view as tokens
from pipeline.reports.page.break_even import Signal
from pipeline.reports.page.charts import histogram
from pipeline.reports.page.distributions import Distribution, distributions_of
from pipeline.reports.page.ranked_view import candidates_sample, logprobs_sample, subsets_sample
from pipeline.reports.page.sampled_rows import READ_ERRORS, SEED, Sample, SampledRow, sample_rows
from pipeline.reports.page.students import Chart
from pipeline.reports.page.words import Tokenizers, Words
from pipeline.reports.step_times import MeasuredTime, measured_time
from pipeline.state.audit_verdict import AuditVerdict, verdict_of
from pipeline.state.step_state import calibration_of
from schemas.errors import first_line
from schemas.storage.manifest import Manifest

SAMPLES_SHOWN = 12
INPUTS_SHOWN = 6  # of a table that measures nothing

VIEWS: dict[str, Callable[[SampledRow, Words], dict[str, Any]]] = {
    "teacher_logits": tokens.logits_sample,
    "token_entropies": tokens.entropies_sample,
    "span_masks": tokens.mask_sample,
    "advantages": tokens.advantages_sample,
    "responses": tokens.responses_sample,
    "subset_preferences": subsets_sample,
    "candidate_scores": candidates_sample,
    "response_logprobs": logprobs_sample,
}

# Whose rows are nothing to look at alone.
ABOUT_TEXT = ("teacher_logits", "token_entropies", "span_masks", "advantages")


@dataclass(slots=True)
class TableSection:
    """One finished table as the page shows it; ``problems`` say what could not be read of it."""

    name: str
    place: str
    kind: str
    manifest: Manifest
    made: MeasuredTime
    sample: Sample | None = None
    verdict: AuditVerdict | None = None
    calibration: str = ""
    charts: list[Chart] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def signal(self) -> Signal:
        """What the break-even reads of it."""
        read_s = None
        if self.sample is not None and len(self.sample.rows) > 0:
            read_s = self.sample.seconds / len(self.sample.rows)
        return Signal(self.manifest.num_rows, self.made, read_s)


def table_section(
    step: PlannedStep, manifest: Manifest, source: PlannedStep | None, tokenizers: Tokenizers
) -> TableSection:
    """Look at a finished table; what cannot be read of it is said, and the rest is shown.

    ``source`` is the step whose rows it is about, where the plan has it.
    """
    section = TableSection(
        name=step.name,
        place=str(step.place),
        kind=manifest.table + (f", {manifest.variant}" if manifest.variant else ""),
        manifest=manifest,
        made=measured_time(step.place, manifest),
    )
    looks: tuple[Callable[[], None], ...] = (
        lambda: _judge(section, step),
        lambda: _sample(section, step, source),
        lambda: _draw(section),
        lambda: _show(section, step, tokenizers),
    )
    for look in looks:
        try:
            look()
        except READ_ERRORS as error:
            section.problems.append(first_line(error))
    return section


def _judge(section: TableSection, step: PlannedStep) -> None:
    if (calibration := calibration_of(step)) is not None:
        section.calibration = str(calibration)
    section.verdict = verdict_of(step.place, section.manifest.dataset_id)


def _sample(section: TableSection, step: PlannedStep, source: PlannedStep | None) -> None:
    section.sample = sample_rows(step, section.manifest, source)
    if section.sample.without_source:
        section.notes.append(f"Rows stand alone: {section.sample.without_source}.")


def _draw(section: TableSection) -> None:
    rows = () if section.sample is None else section.sample.rows
    section.charts = [_chart(found) for found in distributions_of(section.manifest.table, rows)]


def _chart(found: Distribution) -> Chart:
    least, low, median, high, most = found.quantiles
    rows: list[Sequence[str]] = [
        ("values", f"{found.num_values:,}"),
        ("mean", f"{found.mean:.4g}"),
        ("least", f"{least:.4g}"),
        ("5 %", f"{low:.4g}"),
        ("median", f"{median:.4g}"),
        ("95 %", f"{high:.4g}"),
        ("largest", f"{most:.4g}"),
    ]
    bins = zip(found.edges, found.edges[1:], found.counts, strict=False)
    rows += [(f"{a:.4g} to {b:.4g}", f"{count:,}") for a, b, count in bins if count]
    unit = f" ({found.unit})" if found.unit else ""
    return Chart(f"{found.name}{unit}", histogram(found), ("", found.name), rows)


def _show(section: TableSection, step: PlannedStep, tokenizers: Tokenizers) -> None:
    rows = [] if section.sample is None else list(section.sample.rows)
    if not rows:
        return
    view = VIEWS.get(section.manifest.table)
    if section.manifest.table in ABOUT_TEXT and all(sampled.source is None for sampled in rows):
        section.notes.append("The rows that it is about are not at hand: it is shown without text.")
        return
    words = tokenizers.words_of(step)
    if not words.has_text:
        section.notes.append("No folder of the recipe has this table's tokenizer: ids are shown.")
    most = INPUTS_SHOWN if view is None else SAMPLES_SHOWN
    for sampled in _chosen(rows, most):
        try:
            found = tokens.plain_sample(sampled, words) if view is None else view(sampled, words)
        except ValueError as error:
            section.problems.append(first_line(error))
            return
        if found is not None:
            section.samples.append(found)


def _chosen(rows: Sequence[SampledRow], most: int) -> list[SampledRow]:
    """Return some rows in order, a third of them held out where there are as many."""
    heldout = [row for row in rows if row.split == "heldout"]
    others = [row for row in rows if row.split != "heldout"]
    num_heldout = min(len(heldout), max(most // 3, most - len(others)))
    generator = np.random.default_rng(SEED)
    chosen = []
    for part, count in ((heldout, num_heldout), (others, most - num_heldout)):
        chosen += [part[int(i)] for i in generator.permutation(len(part))[:count]]
    return sorted(chosen, key=lambda row: row.index)
