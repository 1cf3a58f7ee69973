"""Audit one table: rows made again by a live teacher, compared, and a verdict beside the table.

Two things are kept apart. *Faithfulness*: what is stored is what storage makes of the live teacher,
within what two live passes of that teacher differ by. *Truncation*: how far the encoding is from
the whole distribution, which is no fault.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.audit.audited import AuditedTable
from pipeline.audit.diagnosis import diagnosis, what_differs
from pipeline.audit.sample import Sample, Sampled, draw_sample, finds
from pipeline.audit.tolerance import FALSE_ALARMS, allowed
from pipeline.state.audit_verdict import AuditVerdict, write_verdict
from schemas.errors import ConfigError, IdentityMismatch
from stages.models.checkpoints.tokenizer_identity import (
    tokenizer_fingerprint,
    vocabulary_fingerprint,
)
from stages.models.encoder_decoder.kind import is_encoder_decoder
from stages.signals.scoring.agreement import Answer, Ask, Compared
from stages.stage import Rejected

EngineKind = Literal["vllm", "transformers"]
F64Array = npt.NDArray[np.float64]
NAMED = 20  # rows that a verdict names
_TOKENS_AT_ONCE = 32_768  # whose states are held


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """How an audit is made. None: as many rows as the guarantee asks for; the other engine."""

    num_rows: int | None = None
    seed: int = 0
    engine: EngineKind | None = None


def audit_table(
    table: AuditedTable, options: AuditOptions, said: Callable[[str], None]
) -> AuditVerdict:
    """Make the audit, write its verdict beside the manifest and return it.

    Raises ConfigError and IdentityMismatch for models that cannot be run on the table at all.
    """
    started = time.perf_counter()
    _require_vocabulary(table)
    sample = draw_sample(table, options.num_rows, options.seed)
    made_in = _engine_of(table)
    live_in = options.engine or _other_engine(table, made_in)
    found = _Found()
    if not sample.problems:
        said(f"{table.name}: {len(sample.rows)} rows to a live teacher in {live_in}")
        _compare(table, sample, live_in, found)
        if live_in != made_in and _can_run(made_in):
            said(f"{table.name}: {sample.num_control} rows of them again in {made_in}, as control")
            _control_in(table, sample, made_in, found)
    verdict = _verdict(table, sample, found, options, live_in, time.perf_counter() - started)
    write_verdict(table.folder, verdict)
    return verdict


class _Found:
    """What came of the comparisons: one for each row, and the control's differences by measure."""

    def __init__(self) -> None:
        self.compared: list[Compared] = []
        self.control: dict[str, dict[str, list[F64Array]]] = {}
        self.answers: list[Answer | None] = []

    def add_control(self, how: str, apart: Mapping[str, F64Array]) -> None:
        for name, values in apart.items():
            self.control.setdefault(name, {}).setdefault(how, []).append(values)

    def of_control(self, name: str) -> dict[str, F64Array]:
        return {how: np.concatenate(a) for how, a in self.control.get(name, {}).items()}


def _require_vocabulary(table: AuditedTable) -> None:
    """Raise IdentityMismatch where the model's token ids are not those of the rows."""
    for setting, name in table.stage.named(table.stage.RUNS):
        place = table.models[name].local_base
        ids = tokenizer_fingerprint(place), vocabulary_fingerprint(place)
        for manifest in (table.manifest, table.source_manifest):
            if not manifest.has_ids_of(*ids):
                raise IdentityMismatch(
                    f"{table.folder}: its {manifest.table} hold ids of tokenizer "
                    f"{manifest.tokenizer[:12]}, {setting} {place} has {ids[0][:12]}: they are of "
                    f"another tokenizer, whatever its size; make the table with the model's own"
                )


def _engine_of(table: AuditedTable) -> EngineKind:
    return table.models[next(name for _, name in table.stage.named(table.stage.RUNS))].engine


def _can_run(engine: EngineKind) -> bool:
    return engine == "transformers" or find_spec("vllm") is not None


def _other_engine(table: AuditedTable, made_in: EngineKind) -> EngineKind:
    """Return the engine that did not make the table, or the one that did where it alone can.

    An encoder-decoder runs in transformers alone, arguments of vLLM that move numbers in vLLM.
    """
    other: EngineKind = "transformers" if made_in == "vllm" else "vllm"
    identities = table.manifest.identity["models"]
    is_bound = any(is_encoder_decoder(one) or "engine_extra" in one for one in identities)
    return other if _can_run(other) and not is_bound else made_in


@contextmanager
def _opened(table: AuditedTable, engine: EngineKind) -> Iterator[Ask]:
    run = {name for _, name in table.stage.named(table.stage.RUNS)}
    models = {
        name: replace(model, engine=engine) if name in run else model
        for name, model in table.models.items()
    }
    if not _can_run(engine):
        raise ConfigError(
            f"--engine {engine}: vllm is not installed: install it, or give the other"
        )
    with table.stage.open_live(table.context(models)) as ask:
        yield ask


def _compare(table: AuditedTable, sample: Sample, engine: EngineKind, found: _Found) -> None:
    """Ask the live teacher about every row, and about those of the control alone once more."""
    with _opened(table, engine) as ask:
        for row, answer in _answers(ask, sample.rows):
            if isinstance(answer, Rejected):
                problem = f"the live teacher rejects it: {answer.reason}"
                places_P = row.question.places_P[:0]
                found.compared.append(
                    Compared(sample_id=answer.sample_id, places_P=places_P, problem=problem)
                )
            else:
                found.compared.append(answer.beside(row.stored))
            if len(found.answers) < sample.num_control:
                found.answers.append(None if isinstance(answer, Rejected) else answer)
        for at, row in enumerate(sample.control):
            _, again = next(_answers(ask, [row]))
            _add_control(found, "another batch", at, again, row)


def _control_in(table: AuditedTable, sample: Sample, engine: EngineKind, found: _Found) -> None:
    """Ask the engine that made the table about the rows of the control."""
    with _opened(table, engine) as ask:
        for at, (row, answer) in enumerate(_answers(ask, sample.control)):
            _add_control(found, "the other engine", at, answer, row)


def _add_control(found: _Found, how: str, at: int, again: Answer | Rejected, row: Sampled) -> None:
    first = found.answers[at]
    if first is None or isinstance(again, Rejected) or found.compared[at].problem:
        return
    found.add_control(how, first.beside_live(again, row.stored))


def _answers(ask: Ask, rows: Sequence[Sampled]) -> Iterator[tuple[Sampled, Answer | Rejected]]:
    """Ask about some rows at a time, as many as are to be held."""
    part: list[Sampled] = []
    for place, row in enumerate(rows):
        part.append(row)
        following = rows[place + 1].question.num_read if place + 1 < len(rows) else _TOKENS_AT_ONCE
        if sum(row.question.num_read for row in part) + following > _TOKENS_AT_ONCE:
            yield from zip(part, ask([row.question for row in part]), strict=True)
            part = []


def _verdict(
    table: AuditedTable,
    sample: Sample,
    found: _Found,
    options: AuditOptions,
    engine: EngineKind,
    seconds: float,
) -> AuditVerdict:
    measures = table.stage.audit.measures(table.stage)
    values: dict[str, list[F64Array]] = {name: [] for name in measures}
    for compared in found.compared:
        for name, apart_P in compared.apart.items():
            values[name].append(apart_P)
    dtype = table.models[next(name for _, name in table.stage.named(table.stage.RUNS))].dtype
    bounds, shown = {}, {}
    for name, measure in measures.items():
        apart_P = np.concatenate([np.zeros(0), *values[name]])
        control = found.of_control(name)
        all_of_control = np.concatenate([np.zeros(0), *control.values()])
        bounds[name] = allowed(
            all_of_control,
            len(apart_P),
            num_measures=len(measures),
            floor=measure.floors[dtype],
        )
        shown[name] = {
            "of": measure.of,
            "unit": measure.unit,
            "most": float(apart_P.max(initial=0.0)),
            "allowed": bounds[name],
            "floor": measure.floors[dtype],
            "compared": len(apart_P),
            "control": {how: float(a.max(initial=0.0)) for how, a in control.items()},
        }
    differing = [what_differs(compared, measures, bounds) for compared in found.compared]
    failed = [at for at, said in enumerate(differing) if said]
    failures = [*sample.problems, *(f"{sample.rows[at].place}: {differing[at]}" for at in failed)]
    read = sum(row.question.num_read for row in sample.rows)
    control_reads = 1 + any("the other engine" in how for how in found.control.values())
    control_read = control_reads * sum(row.question.num_read for row in sample.control)
    num_rows = table.manifest.num_rows
    settings = {
        "rows": len(sample.rows),
        "whole_rows": sample.num_whole,
        "control_rows": sample.num_control,
        "seed": options.seed,
        "made_in": _engine_of(table),
        "dtype": dtype,
        "false_alarm_rate": FALSE_ALARMS,
        "finds_in_rows": finds(len(sample.rows), num_rows),
        "finds_at_any_position": finds(sample.num_whole, num_rows),
        "found_with": 0.99,
        "tokens_read": read + control_read,
        "cost": (read + control_read) / max(sample.capture_tokens, 1.0),
        "seconds": round(seconds, 1),
        "num_failed": len(sample.problems) + len(failed),
        "diagnosis": diagnosis(sample.rows, found.compared, failed),
    }
    return AuditVerdict(
        outcome="unfaithful" if failures else "faithful",
        dataset_id=table.manifest.dataset_id,
        audited_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        num_rows=len(found.compared),
        num_positions=sum(len(compared.places_P) for compared in found.compared),
        engine=engine,
        settings=settings,
        measures=shown,
        truncation=_truncation(found.compared),
        failures=failures[:NAMED],
    )


def _truncation(compared: Sequence[Compared]) -> dict[str, float]:
    """Return means over positions, and of errors the mean size too."""
    names: dict[str, Any] = {name: None for row in compared for name in row.truncation}
    means = {}
    for name in names:
        values = np.concatenate([row.truncation[name] for row in compared if row.truncation])
        means[name] = float(values.mean())
        if (values < 0).any():
            means[f"{name}, mean size"] = float(np.abs(values).mean())
    return means
