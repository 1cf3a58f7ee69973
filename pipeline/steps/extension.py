"""A table made of an earlier one: rows that it has are copied, all others worked on.

Three acts, each of which a killed run goes on with. What can be copied is found, and all other rows
of the input are gathered in shards of their own (``.extend`` in the step's folder): so an engine
has full batches of them, however thinly they are spread. The work is done on these as on any input,
by the same executor. Then each shard of the step is put together of rows that lie there, without an
engine. A copied row has the bytes it had; a run of all rows might have given it other last bits.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.executors.copied_rows import CopiedTable, CopyStage
from pipeline.executors.shard_task import StepTasks
from pipeline.planning.plan import PlannedStep
from pipeline.planning.recipe import Execution
from pipeline.state.extension_record import EXTENSION, ExtensionPlan
from pipeline.state.kept_shards import kept_shards
from pipeline.state.step_lock import remove_torn_files
from pipeline.steps.extension_plan import (
    INPUT,
    MADE,
    begun,
    is_there,
    known_rows,
    planned,
    remove,
)
from pipeline.steps.predecessors import is_calibrated
from pipeline.steps.reporter import Reporter, engines_starting
from pipeline.steps.table_step import (
    Make,
    context_of,
    made_by,
    make_missing,
    on_executor,
    source_of,
)
from schemas.errors import StoreError
from schemas.open_table import open_table
from schemas.storage.files import Folder, as_folder
from schemas.storage.manifest import (
    Manifest,
    manifest_if_there,
    read_manifest,
    write_manifest,
)
from schemas.storage.records import ShardRecord, read_notes, shard_index
from stages.signals.teacher_logits.calibration import CALIBRATION, keep_first, read_calibration
from stages.stage import SignalStage, StageContext, TableStage

_OF_THE_ENGINE = ("head_check",)  # notes in a record that say what its rows were made by


def extend_table(
    step: PlannedStep,
    stage: SignalStage,
    roots: Sequence[Folder],
    execution: Execution,
    reporter: Reporter,
) -> None:
    """Make the shards that are missing of a step, as far as rows of finished tables serve it.

    Without ``roots``, go on with an extension that was begun, if one was. Where no table serves,
    nothing is made. Hold the step's lock for it; ``run_table`` then makes the rest.
    """
    folder = step.place / EXTENSION
    if not (roots or is_there(folder)):
        return
    source = source_of(step)
    assert isinstance(source, Manifest)
    num_shards = len(source.shards)
    with kept_shards(step.place, num_shards, range(num_shards)) as kept:
        missing = kept.missing()
    if not missing:
        return
    plan = begun(folder, missing)
    if plan is None:
        remove(folder)
        if not roots:
            return
        plan = planned(step, source, missing, roots, warned=reporter.warned)
        if not plan.num_copied:
            reporter.extending("no finished table has a row of it: all are made")
            return
    copied = ", ".join(f"{one.num_rows:,} of {one.folder}" for one in plan.sources)
    reporter.extending(
        f"{plan.num_new:,} of {plan.num_rows:,} rows are new, the others are copied: {copied}"
    )
    if is_calibrated(step):
        _keep_tau(step, plan, reporter)
    if plan.num_new:
        _make_new(step, stage, plan, execution, reporter)
    _put_together(step, stage, source, plan, execution, reporter)


def _keep_tau(step: PlannedStep, plan: ExtensionPlan, reporter: Reporter) -> None:
    """Make the tau of the rows that are copied the table's."""
    of = as_folder(plan.sources[0].folder)
    theirs = read_calibration(of)
    if theirs is None or keep_first(step.place, theirs).tau != theirs.tau:
        raise StoreError(
            f"{step.place / CALIBRATION} has another tau than {of}, whose rows were to be copied: "
            f"delete the folder {step.place / EXTENSION} and run again"
        )
    reporter.extending(f"the rows keep their tau, which is not found anew: {theirs} of their input")


def remove_extension(step: PlannedStep) -> None:
    """Free what an extension needed on the way; a run killed just before left that behind."""
    folder = step.place / EXTENSION
    if isinstance(step.stage, SignalStage) and is_there(folder):
        remove(folder)


def _make_new(
    step: PlannedStep,
    stage: SignalStage,
    plan: ExtensionPlan,
    execution: Execution,
    reporter: Reporter,
) -> Manifest:
    """Do the work on the rows that are new, in shards of their own; return the table of them."""
    folder = step.place / EXTENSION / MADE
    done = manifest_if_there(folder)
    if done is not None:
        return done
    place = step.place / EXTENSION / INPUT
    gathered = read_manifest(place)
    context = context_of(step, stage, gathered, execution)
    # What the whole step would put up with: these rows stand for all of it.
    most_rejected = min(1.0, stage.max_rejected_fraction * plan.num_rows / plan.num_new)

    tasks = partial(
        StepTasks,
        folder=folder,
        input_folder=place,
        input_shards=gathered.shard_list,
        max_rejected_fraction=most_rejected,
        made_by=made_by(step),
    )
    make = _maker(stage, context, tasks, execution, reporter)
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    remove_torn_files(folder)
    num_shards = len(gathered.shards)
    shards = make_missing(folder, num_shards, range(num_shards), make, reporter).finish()
    table = stage.table
    manifest = replace(
        gathered,
        table=table.name,
        version=table.version,
        variant=table.variant,
        fingerprint=step.fingerprint,
        identity=step.identity,
        vocab_size=stage.bind(context).vocab_size,
        shards=shards,
    )
    write_manifest(folder, manifest)
    return manifest


def _put_together(
    step: PlannedStep,
    stage: SignalStage,
    source: Manifest,
    plan: ExtensionPlan,
    execution: Execution,
    reporter: Reporter,
) -> None:
    """Write the shards of the step, each row as it lies somewhere."""
    folder = step.place / EXTENSION
    tables = [CopiedTable(as_folder(one.folder), one.dataset_id) for one in plan.sources]
    origins, rejects = known_rows(folder), {}
    notes = _engine_notes(tables[0].folder)
    if plan.num_new:
        made = read_manifest(folder / MADE)
        notes |= _engine_notes(folder / MADE)
        rejects = _rejects(folder / MADE, made)
        if made.num_rows:
            new = open_table(folder / MADE, split=None, verify=False).sample_ids()
            origins = origins.with_table(len(tables), new)
            tables.append(CopiedTable(folder / MADE, made.dataset_id))
    if (calibration := read_calibration(step.place)) is not None:
        notes["tau"] = calibration.tau
    context = context_of(step, stage, source, execution)
    copy = CopyStage(
        input="",
        like=stage,
        like_context=context,
        tables=tuple(tables),
        origins=origins,
        rejects=rejects,
    )
    extended = {one.fingerprint: one.num_rows for one in plan.sources}
    no_device = execution.engine.model_copy(update={"device": "cpu"})
    place = replace(context, models={}, engine=no_device)

    tasks = partial(
        StepTasks,
        folder=step.place,
        input_folder=step.inputs[0].place,
        input_shards=source.shard_list,
        max_rejected_fraction=stage.max_rejected_fraction,
        made_by={**made_by(step), **notes, "extended_from": extended},
    )
    make = _maker(copy, place, tasks, execution, reporter)
    num_shards = len(source.shards)
    make_missing(step.place, num_shards, range(num_shards), make, reporter)


def _maker(
    stage: TableStage,
    context: StageContext,
    tasks: Callable[..., StepTasks],
    execution: Execution,
    reporter: Reporter,
) -> Make:
    """Return what makes shards by the step's executor; ``tasks`` lacks their indices alone."""

    def make(indices: Sequence[int]) -> Iterator[tuple[int, ShardRecord]]:
        if not indices:
            return
        engines_starting(stage, context, execution, reporter)
        for record in on_executor(stage, context, tasks(indices=indices), execution, reporter):
            yield shard_index(record.name), record

    return make


def _engine_notes(folder: Folder) -> dict[str, Any]:
    """Return what the first record of a table says of the engine that made it."""
    manifest = read_manifest(folder)
    body = read_notes(folder, manifest.shards[0].name) if manifest.shards else None
    notes = (body or {}).get("notes", {})
    return {name: notes[name] for name in _OF_THE_ENGINE if name in notes}


def _rejects(folder: Folder, made: Manifest) -> dict[str, str]:
    """Return why rows were rejected, by key."""
    found: dict[str, str] = {}
    for shard in made.shards:
        if shard.rejects:
            for line in (folder / f"{shard.name}.rejects.jsonl").read_text().splitlines():
                row = json.loads(line)
                found[row["sample_id"]] = row["reason"]
    return found
