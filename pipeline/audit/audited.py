"""What is audited: a finished table, the stage and models that made it, and what it was made of.

Of a recipe all of that is in its plan. Of a folder alone the settings are in the manifest, the
input lies in the same root by its fingerprint, and the models are given and have to be those that
the manifest names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.planning.fingerprint import ADDRESS_DIGITS, model_identity
from pipeline.planning.plan import Model, PlannedStep, make_plan
from pipeline.planning.recipe_file import load_recipe
from pipeline.state.step_state import finished_manifest
from schemas.errors import ConfigError
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest, manifest_if_there, read_manifest
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.models.checkpoints.tokenizer_identity import vocabulary_fingerprint
from stages.models.spec import EngineOptions, ModelSpec
from stages.registry import STAGES, name_of
from stages.stage import StageContext, TableStage

_HOW = ("dtype", "engine", "engine_extra")


@dataclass(frozen=True, slots=True)
class AuditedTable:
    """A finished table and all that its rows can be made of once more.

    ``models`` are by the names that the stage gives them, ``engine`` is how they are run.
    """

    name: str
    folder: Folder
    manifest: Manifest
    stage: TableStage
    models: Mapping[str, ModelSpec]
    source: Folder
    source_manifest: Manifest
    engine: EngineOptions

    def context(self, models: Mapping[str, ModelSpec]) -> StageContext:
        """Return what the stage's work is given, with the models as they are to be run."""
        return StageContext(
            folder=self.folder,
            vocab_size=self.source_manifest.vocab_size,
            models=models,
            engine=self.engine,
            input_table=self.source_manifest.table,
            input_folder=self.source,
        )


def tables_of_recipe(
    path: Path, overrides: Sequence[str], steps: Sequence[str]
) -> list[AuditedTable]:
    """Return the finished signal tables of a recipe, or those of some of its steps."""
    recipe = load_recipe(path, overrides)
    plan = make_plan(recipe)
    names = [step.name for step in plan]
    for name in steps:
        if name not in names:
            raise ConfigError(f"--step: '{name}' is no step of {path}; there are: {names}")
    wanted = [step for step in plan if step.name in steps] if steps else plan
    found = []
    for step in wanted:
        table = _of_step(step, recipe.execution.engine)
        if table is not None:
            found.append(table)
        elif steps:
            raise ConfigError(
                f"--step: '{step.name}' is no finished signal table: run it first, or name a step "
                f"that runs a model on each row"
            )
    if not found:
        raise ConfigError(f"{path} has no finished signal table: run it first")
    return found


def _of_step(step: PlannedStep, engine: EngineOptions) -> AuditedTable | None:
    stage = step.stage
    if not isinstance(stage, TableStage) or stage.audit is None:
        return None
    manifest = finished_manifest(step)
    if manifest is None:
        return None
    models = {name: model.spec() for name, model in step.models.items()}
    source = step.inputs[0].place
    return AuditedTable(
        step.name, step.place, manifest, stage, models, source, read_manifest(source), engine
    )


def table_in(folder: Folder, models: Sequence[Path], adapters: Sequence[Path]) -> AuditedTable:
    """Return the table in a folder, with the models that are given in the order of the stage's.

    Raises ConfigError in one line for a table that no model made, an input that is not there and a
    model that is another.
    """
    manifest = read_manifest(folder)
    stage, names = _stage_of(manifest, folder)
    source, source_manifest = _source_of(stage, manifest, folder)
    identities = list(manifest.identity["models"])
    if len(models) != len(identities):
        asked = ", ".join(names[: len(identities)])
        raise ConfigError(
            f"{folder} was made by {len(identities)} models ({asked}) and {len(models)} are given: "
            f"give --model FOLDER for each, in that order, or audit its recipe"
        )
    left = list(adapters)
    specs = {}
    for name, place, identity in zip(names, models, identities, strict=False):
        adapter = left.pop(0) if "adapter" in identity and left else None
        specs[name] = _given(place, identity, adapter, folder)
    specs |= dict.fromkeys(names[len(specs) :], specs[names[0]])  # one model in two parts
    extra: dict[str, Any] = {}
    for one in identities:
        extra |= one.get("engine_extra", {})
    engine = EngineOptions(extra=extra)
    return AuditedTable(
        str(folder), folder, manifest, stage, specs, source, source_manifest, engine
    )


def _stage_of(manifest: Manifest, folder: Folder) -> tuple[TableStage, list[str]]:
    """Return the stage that made a table, its models called by their settings, and these names."""
    identity = manifest.identity
    kind = next((stage for stage in STAGES if name_of(stage) == identity.get("stage")), None)
    if kind is None or not issubclass(kind, TableStage) or not identity.get("models"):
        raise ConfigError(
            f"{folder} holds {manifest.table} of stage '{identity.get('stage', 'unknown')}', which "
            f"no model made row by row: audit a table of signals"
        )
    if identity["version"] != kind.VERSION:
        raise ConfigError(
            f"{folder} was made by version {identity['version']} of stage {identity['stage']}, "
            f"this code has {kind.VERSION}, whose rows are others: audit it with the other version"
        )
    body: dict[str, Any] = dict(identity["config"])
    body.pop("calibrated_over", None)
    settings = [*kind.RUNS, *kind.ALSO_RUNS]
    names = []
    for setting in settings:
        *parts, last = setting.split(".")
        place = body
        for part in parts:
            place[part] = dict(place.get(part, {}))
            place = place[part]
        if parts and not place:
            continue
        place[last] = last
        names.append(last)
    if kind.ALSO_RUNS and len(names) > len(identity["models"]):  # a sampler without an encoder
        body["sampler"] = identity["config"]["sampler"]
        names = names[: len(identity["models"])]
    stage = kind.model_validate({**body, "stage": identity["stage"], "input": "input"})
    if stage.audit is None:
        raise ConfigError(f"{folder} holds {manifest.table}, which no audit can make again")
    return stage, names


def _source_of(stage: TableStage, manifest: Manifest, folder: Folder) -> tuple[Folder, Manifest]:
    fingerprint = str(manifest.identity["inputs"][0])
    for table in stage.CONSUMES:
        place = folder.parent.parent / table.name / fingerprint[:ADDRESS_DIGITS]
        found = manifest_if_there(place)
        if found is not None and found.fingerprint == fingerprint:
            return place, found
    raise ConfigError(
        f"{folder} was made of {fingerprint[:ADDRESS_DIGITS]}, which is not in its root "
        f"{folder.parent.parent}: put the input there, or audit its recipe"
    )


def _given(
    place: Path, identity: Mapping[str, Any], adapter: Path | None, folder: Folder
) -> ModelSpec:
    """Return a model that is given, if it is the one that made the table."""
    dtype, engine = identity["dtype"], identity["engine"]
    found: Mapping[str, Any]
    if "step" in identity:
        record = read_checkpoint(place)
        found = {"step": "" if record is None else record.fingerprint}
    else:
        trusted = "code" in identity
        found = model_identity(
            place, dtype=dtype, engine=engine, adapter=adapter, trust_remote_code=trusted
        )
    keys = [key for key in {**identity, **found} if key not in _HOW]
    others = sorted(key for key in keys if identity.get(key) != found.get(key))
    if others:
        hint = "; its adapter is given by --adapter" if "adapter" in others else ""
        raise ConfigError(
            f"--model {place} is not the model that made {folder}: {', '.join(others)} "
            f"{'differs' if len(others) == 1 else 'differ'}{hint}"
        )
    vocabulary = vocabulary_fingerprint(place)
    trusted = "code" in identity
    return Model(place, dtype, engine, identity, vocabulary, adapter, trusted).spec()
