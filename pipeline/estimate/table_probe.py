"""Probes of steps that write tables: a source of part of its files, a map of a few rows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.estimate.measures import Clock, Line
from pipeline.estimate.probed_plan import ProbedPlan
from pipeline.estimate.sample_tables import rows_of
from pipeline.estimate.sizes import Found, Size, counts_of, scaled, table_bytes
from pipeline.estimate.source_sample import sample_of
from pipeline.planning.plan import PlannedStep
from pipeline.state.step_state import finished_manifest
from pipeline.steps.table_step import (
    bound_source,
    context_of,
    make_shards,
    run_table,
    write_table_manifest,
)
from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.documents import SPLITS
from stages.file_map import FileMapStage
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.sources.finished_table.stage import FinishedTableStage
from stages.sources.prepared import within
from stages.stage import SourceStage, TableStage


def probe_source(plan: ProbedPlan, step: PlannedStep, stage: SourceStage) -> Found:
    """Prepare a sample of the source, or all of it where it is small, and write a few rows."""
    work = plan.folder / f"{step.name}.source"
    work.mkdir()
    sample = sample_of(getattr(stage, "source", None), work)
    clock = Clock(plan.said)
    if sample is None:
        prepared = stage.prepare(work / "all")
        counts = _rows_by_split(prepared.shards)
        line = Line(clock.seconds, 0.0)
        spread, found_by = 0.0, "the whole source, prepared"
        halves = [(stage, work / "all", prepared)]
    else:
        halves, per_share, shares = [], [], sum(sample.shares)
        for number, source in enumerate(sample.sources):
            half = stage.model_copy(update={"source": source, "max_rows": None})
            began = clock.seconds
            prepared = half.prepare(work / f"{number}")
            slope = (clock.seconds - began) / sample.shares[number]
            halves.append((half, work / f"{number}", prepared))
            per_share.append(_num_rows(prepared.shards) / sample.shares[number])
        made = [_rows_by_split(prepared.shards) for _, _, prepared in halves]
        every = {split: round((made[0][split] + made[1][split]) / shares) for split in SPLITS}
        counts = within(every, getattr(stage, "max_rows", None))
        line = Line(max(0.0, clock.seconds - slope * shares), slope)
        mean = sum(per_share) / 2
        spread = abs(per_share[0] - per_share[1]) / max(mean, 1.0)
        if sum(counts.values()) < (1 - spread) * sum(every.values()):
            spread = 0.0  # max_rows decides
        found_by = f"{shares:.1%} of the source's {sample.counted_by}, prepared in two halves"
    num_rows = sum(counts.values())
    if sample is None:
        num_shards = len(halves[0][2].shards)
    else:
        each = stage.rows_per_shard  # type: ignore[attr-defined]  # whatever is sampled has it
        num_shards = sum(math.ceil(count / each) for count in counts.values())
    readers = {split: _prepared_rows(halves, split) for split in SPLITS}
    tokenizer = tokenizer_fingerprint(Path(stage.tokenizer))
    began = clock.seconds
    bound = bound_source(step, stage)
    manifest = plan.write_cut(step, bound, readers, counts, num_shards, tokenizer)
    write_seconds = (clock.seconds - began) / max(1, manifest.num_rows)
    size = scaled(Size.of(manifest), manifest.num_rows, num_rows, num_shards, counts)
    return Found(
        size=size,
        num_bytes=table_bytes(manifest, size),
        start_seconds=line.start,
        seconds=line.slope + write_seconds * num_rows,
        spread=spread,
        found_by=found_by,
    )


def probe_pieces(plan: ProbedPlan, step: PlannedStep, stage: FileMapStage) -> Found:
    """Make the first pieces of the files; all pieces are known from the files' headers."""
    every = stage.pieces()
    chosen = [
        piece
        for split, count in zip(SPLITS, (3, 1), strict=True)
        for piece in [piece for piece in every if piece.split == split][:count]
    ]
    whole = replace(step, place=plan.folder / f"{step.name}.pieces")
    clock = Clock(plan.said)
    shards = make_shards(whole, stage, chosen, range(len(chosen)), plan.alone, clock).finish()
    bound = stage.bind(context_of(whole, stage, chosen, plan.alone))
    tokenizer = tokenizer_fingerprint(Path(stage.tokenizer))
    write_table_manifest(whole, bound, shards, tokenizer, {})
    manifest = finished_manifest(whole)
    assert manifest is not None
    read, total = (sum(piece.num_rows for piece in some) for some in (chosen, every))
    line = clock.shard_line([piece.num_rows for piece in chosen])
    share = total / max(1, read)
    counts = {split: round(count * share) for split, count in counts_of(manifest).items()}
    num_rows = round(manifest.num_rows * share)
    size = scaled(Size.of(manifest), manifest.num_rows, num_rows, len(every), counts)
    readers = rows_of(whole, manifest, stage.table)
    plan.write_cut(step, bound, readers, counts, len(every), tokenizer)
    return Found(
        size=size,
        num_bytes=table_bytes(manifest, size),
        start_seconds=line.start,
        seconds=line.slope * total,
        found_by=f"{len(chosen)} of {len(every)} pieces of its files",
    )


def probe_table(plan: ProbedPlan, step: PlannedStep, stage: TableStage) -> Found:
    """Do the step's work on the probe's input; a token costs the same in all of the input."""
    probed = plan.moved(step)
    clock = Clock(plan.said)
    run_table(probed, stage, plan.alone, clock)
    made, source = finished_manifest(probed), finished_manifest(probed.inputs[0])
    assert made is not None and source is not None
    before = plan.found[step.inputs[0].name]
    assert before.size is not None
    line = clock.shard_line([shard.num_tokens for shard in source.shards])
    share = before.size.num_tokens / max(1, source.num_tokens)
    heldout = round(Size.of(made).num_heldout * share)
    size = Size(
        round(made.num_rows * before.size.num_rows / max(1, source.num_rows)),
        round(made.num_tokens * share),
        round(made.num_positions * share),
        before.size.num_shards,
        heldout,
    )
    assert isinstance(probed.place, Path)
    beside = sum((probed.place / name).stat().st_size for name in made.files)
    return Found(
        size=size,
        num_bytes=table_bytes(made, size) + beside,
        start_seconds=line.start,
        seconds=line.slope * before.size.num_tokens,
        spread=before.spread,
        found_by=f"{source.num_rows} rows, {source.num_tokens:,} tokens of its input",
    )


def cut_finished(plan: ProbedPlan, step: PlannedStep, manifest: Manifest) -> None:
    """Let the probe read a few rows of a finished table, of those that its input was cut to."""
    made_of = [plan.samples[f] for f in _inputs_of(manifest) if f in plan.samples]
    readers = rows_of(step, manifest, _table_of(step), made_of[0] if made_of else None)
    bound, num_shards = _bound_of(plan, step, manifest), len(manifest.shards)
    plan.write_cut(step, bound, readers, counts_of(manifest), num_shards, manifest.tokenizer)


def _bound_of(plan: ProbedPlan, step: PlannedStep, manifest: Manifest) -> BoundTable[Any]:
    if isinstance(step.stage, TableStage):
        source = finished_manifest(step.inputs[0])
        assert source is not None, "a finished table's input is finished"
        return step.stage.bind(context_of(step, step.stage, source, plan.alone))
    table = _table_of(step)
    bound: BoundTable[Any] = table.bind(vocab_size=manifest.vocab_size)
    return bound


def _table_of(step: PlannedStep) -> Table[Any]:
    assert isinstance(step.stage, SourceStage | TableStage | FinishedTableStage)
    return step.stage.table


def _inputs_of(manifest: Manifest) -> Sequence[str]:
    return list(manifest.identity.get("inputs", ()))


def _rows_by_split(shards: Sequence[Any]) -> dict[str, int]:
    counts = dict.fromkeys(SPLITS, 0)
    for shard in shards:
        counts[shard.split] += shard.rows
    return counts


def _num_rows(shards: Sequence[Any]) -> int:
    return sum(shard.rows for shard in shards)


def _prepared_rows(halves: Sequence[tuple[Any, Path, Any]], split: str) -> Iterator[Any]:
    return chain.from_iterable(
        stage.read(work, index)
        for stage, work, prepared in halves
        for index, shard in enumerate(prepared.shards)
        if shard.split == split
    )
