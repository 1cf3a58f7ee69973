"""A recipe's plan: its steps in order, what each is called by content, and where it lies.

A step's fingerprint is the hash of its identity: stage, stage version, configuration without its
references, the table it writes, and the identities of its inputs and models in place of their
names. So renaming a step moves nothing, and changing anything that moves bytes moves its folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.planning.fingerprint import (
    ADDRESS_DIGITS,
    fingerprint_of,
    hidden_size_of,
    model_identity,
    vocab_size_of,
)
from pipeline.planning.hub_data import with_commits
from pipeline.planning.hub_models import with_local_folders
from pipeline.planning.recipe import ModelRef, Recipe
from pipeline.planning.rounds import with_rounds
from schemas.errors import ConfigError, IdentityMismatch, TeacherCacheError
from schemas.storage.files import Folder
from stages.models.checkpoints.adapters import trained_name
from stages.models.checkpoints.checkpoint import local_copy
from stages.models.checkpoints.own_code import check_trust, trust
from stages.models.checkpoints.tokenizer_identity import (
    tokenizer_fingerprint,
    vocabulary_fingerprint,
)
from stages.models.encoder_decoder.kind import encoder_decoder_problem
from stages.models.spec import ModelSpec
from stages.registry import Step
from stages.sources.finished_table.stage import FinishedTableStage
from stages.stage import Kind, SourceStage, Stage, TableRef, TableStage


@dataclass(frozen=True, slots=True)
class Model:
    """A model a step uses: where it lies, how to run it, and what names it by content."""

    base: Folder
    dtype: str
    engine: Literal["vllm", "transformers"]
    identity: Mapping[str, Any]
    vocabulary: str
    adapter: Folder | None = None
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        """An ordinary transformers folder of this machine; see ``ModelSpec.path``."""
        return local_copy(self.base) if self.adapter is None else self.spec().path

    def spec(self) -> ModelSpec:
        """The model as stages see it; its folder has to exist by now."""
        width = hidden_size_of(self.base)
        merged_name = ""
        if self.adapter is not None and "step" in self.identity:
            merged_name = trained_name(self.adapter, self.dtype)
        elif self.adapter is not None:
            parts = ("config", "weights", "tokenizer", "adapter", "dtype")
            merged_name = fingerprint_of({part: self.identity[part] for part in parts})[:32]
        return ModelSpec(
            self.base,
            self.dtype,
            self.engine,
            width,
            self.adapter,
            merged_name,
            self.trust_remote_code,
        )


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of a plan, with all its references resolved."""

    name: str
    stage: Step
    identity: Mapping[str, Any]
    fingerprint: str
    place: Folder
    inputs: "tuple[PlannedStep, ...]" = ()
    models: Mapping[str, Model] = field(default_factory=dict)
    vocabulary: str = ""  # fingerprint of which ids text has in its rows or for its checkpoint
    recipe: str = ""  # its name: for people, of what was made

    @property
    def folder(self) -> Path:
        """``place``, for who knows that the recipe's root lies on this machine."""
        assert isinstance(self.place, Path)
        return self.place

    @property
    def writes_table(self) -> bool:
        """Whether the step writes shards (else a checkpoint)."""
        return self.kind in ("source", "table")

    @property
    def kind(self) -> Kind:
        """What the step does: make a table from files or from a table, a checkpoint or a report."""
        return self.stage.KIND

    @property
    def makes_model(self) -> bool:
        """Whether a later step may use this one as its model."""
        return self.kind == "checkpoint"


def make_plan(recipe: Recipe) -> list[PlannedStep]:
    """Resolve and fingerprint every step, in order; raises ConfigError for a dangling reference.

    A model of the hub is fetched, as its content is its identity; of its data sets the commit is.
    """
    recipe = with_commits(with_local_folders(with_rounds(recipe)))
    _admit_code(recipe)
    planned: dict[str, PlannedStep] = {}
    for name, stage in recipe.steps.items():
        planned[name] = _plan_step(name, stage, recipe, planned)
    return list(planned.values())


def _admit_code(recipe: Recipe) -> None:
    """Let this process run what code the recipe trusts; refuse what it leaves open."""
    settings: dict[Path, tuple[str, bool]] = {}
    for name, ref in recipe.models.items():
        if ref.path is None:
            continue
        check_trust(ref.folder, ref.trust_remote_code, f"models.{name}")
        setting = (name, bool(ref.trust_remote_code))
        first, allowed = settings.setdefault(ref.folder.resolve(), setting)
        if allowed != setting[1]:
            raise ConfigError(
                f"models.{name}.trust_remote_code: model '{first}' is the same folder "
                f"({ref.folder}) and says otherwise: give both the same"
            )
        trust(ref.folder, allowed)


def _plan_step(
    name: str, stage: Step, recipe: Recipe, planned: Mapping[str, PlannedStep]
) -> PlannedStep:
    place = f"steps.{name}"
    if isinstance(stage, FinishedTableStage):
        return _finished_step(name, stage)
    tokenizer = None
    if (reference := getattr(stage, stage.TOKENIZER, None)) is not None:
        tokenizer = _tokenizer_folder(reference, recipe, f"{place}.{stage.TOKENIZER}")
        stage = stage.model_copy(update={stage.TOKENIZER: str(tokenizer)})
    identity = stage.hashed()
    if tokenizer is not None:
        identity["config"][stage.TOKENIZER] = tokenizer_fingerprint(tokenizer)
        identity["vocab_size"] = vocab_size_of(tokenizer)
        vocabulary = vocabulary_fingerprint(tokenizer)
    inputs = tuple(
        _table_step(ref, planned, f"{place}.{setting}") for setting, ref in stage.named(stage.READS)
    )
    models = _models(stage, stage.RUNS, recipe, planned, place)
    _check(stage, inputs, models, place)
    _refuse_adapter_on_adapter(stage, models, planned, place)
    _refuse_other_vocabulary(models, inputs, place)
    _refuse_nothing_held_out(stage, inputs, place)
    models |= _models(stage, stage.ALSO_RUNS, recipe, planned, place)
    identity["inputs"] = [step.fingerprint for step in inputs]
    identity["models"] = [dict(model.identity) for model in models.values()]
    fingerprint = fingerprint_of(identity)
    folder = recipe.execution.root / _group(stage) / fingerprint[:ADDRESS_DIGITS]
    if tokenizer is None:
        # A stage that runs no model maps rows to rows with the same ids.
        vocabulary = next(iter(models.values())).vocabulary if models else inputs[0].vocabulary
    resolved = (identity, fingerprint, folder, inputs, models, vocabulary)
    return PlannedStep(name, stage, *resolved, recipe.name)


def _finished_step(name: str, stage: FinishedTableStage) -> PlannedStep:
    """Return the step of a table that lies there: it is called what its manifest says."""
    try:
        manifest, _ = stage.manifest, stage.table
    except TeacherCacheError as error:
        raise ConfigError(f"steps.{name}.folder: {error}") from error
    found = manifest.identity, manifest.fingerprint
    return PlannedStep(name, stage, *found, stage.place, vocabulary=manifest.vocabulary)


def _models(
    stage: Stage,
    settings: Sequence[str],
    recipe: Recipe,
    planned: Mapping[str, PlannedStep],
    place: str,
) -> dict[str, Model]:
    found = {}
    extra = recipe.execution.engine.extra_in_name
    for setting, ref in stage.named(settings):
        model = _model(ref, recipe, planned, f"{place}.{setting}")
        if model.trust_remote_code and stage.KIND == "checkpoint":
            raise ConfigError(
                f"{place}.{setting}: model '{ref}' brings code of its own, which the model that "
                f"this step makes would need too; that is not supported: name a model of "
                f"transformers' own classes"
            )
        is_asked, is_run = setting in stage.ENCODER_DECODERS, isinstance(stage, TableStage)
        problem = encoder_decoder_problem(model.identity, is_asked=is_asked, is_run=is_run)
        if problem and settings is stage.RUNS:
            raise ConfigError(f"{place}.{setting}: model '{ref}' {problem}")
        if extra and model.engine == "vllm" and isinstance(stage, TableStage):  # else none starts
            model = replace(model, identity={**model.identity, "engine_extra": extra})
        found[ref] = model
    return found


def _refuse_adapter_on_adapter(
    stage: Stage, models: Mapping[str, Model], planned: Mapping[str, PlannedStep], place: str
) -> None:
    """Of a model with an adapter, a step may train that very adapter, or all weights."""
    if stage.adapts is None or (adapter := models[stage.adapts].adapter) is None:
        return
    maker = next((step for step in planned.values() if step.place == adapter), None)
    if maker is None or not stage.goes_on_from(maker.stage):
        whose = "a folder" if maker is None else f"step '{maker.name}'"
        raise ConfigError(
            f"{place}.lora: '{stage.adapts}' has an adapter already, of {whose}: give the same "
            f"rank, alpha and targets as the step that made it, or leave lora out to train the "
            f"merged weights"
        )


def _refuse_nothing_held_out(stage: Stage, inputs: Sequence[PlannedStep], place: str) -> None:
    if getattr(stage, "early_stopping", None) is None:
        return
    source = inputs[0]
    while source.inputs:
        source = source.inputs[0]
    if getattr(source.stage, "heldout_fraction", None) == 0:
        raise ConfigError(
            f"{place}.early_stopping: it measures held-out rows, and step '{source.name}' holds "
            f"none out: set heldout_fraction there above 0, or leave early_stopping out"
        )


def _check(
    stage: Stage, inputs: Sequence[PlannedStep], models: Mapping[str, Model], place: str
) -> None:
    tables = []
    for step in inputs:
        assert isinstance(step.stage, SourceStage | TableStage | FinishedTableStage)
        made_by = next(iter(step.identity.get("models", ())), None)
        made_of = tuple(step.identity.get("inputs", ()))
        tables.append(TableRef(step.name, step.stage.table, made_by, step.fingerprint, made_of))
    try:
        stage.check(tables, {name: model.identity for name, model in models.items()})
    except ConfigError as error:
        raise ConfigError(f"{place}.{error}") from error


def _group(stage: Stage) -> str:
    """Return the folder of the root that a stage's outputs lie in."""
    if isinstance(stage, SourceStage | TableStage):
        return stage.table.name
    return {"checkpoint": "checkpoints", "report": "evaluations"}[stage.KIND]


def _tokenizer_folder(reference: str, recipe: Recipe, place: str) -> Path:
    if reference not in recipe.models:
        folder = Path(reference).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"{place}: '{reference}' is neither under 'models' nor a folder; there are: "
                f"{', '.join(recipe.models) or 'none'}"
            )
        return folder
    if recipe.models[reference].path is None:
        raise ConfigError(
            f"{place}: model '{reference}' is made by a step, expected a model folder: name the "
            f"model whose tokenizer that step keeps"
        )
    return recipe.models[reference].folder


def _refuse_other_vocabulary(
    models: Mapping[str, Model], inputs: Sequence[PlannedStep], place: str
) -> None:
    for name, model in models.items():
        for source in inputs:
            if source.vocabulary != model.vocabulary:
                raise IdentityMismatch(
                    f"{place}: step '{source.name}' holds ids of vocabulary "
                    f"{source.vocabulary[:12]}, model '{name}' has {model.vocabulary[:12]}: make "
                    f"the documents with that model's own tokenizer"
                )


def _table_step(reference: str, planned: Mapping[str, PlannedStep], place: str) -> PlannedStep:
    step = planned.get(reference)
    if step is None or not step.writes_table:
        tables = [name for name, other in planned.items() if other.writes_table]
        raise ConfigError(
            f"{place}: '{reference}' is not an earlier step that writes a table; "
            f"there are: {', '.join(tables) or 'none'}"
        )
    return step


def _model(reference: str, recipe: Recipe, planned: Mapping[str, PlannedStep], place: str) -> Model:
    if reference in planned and reference not in recipe.models:
        return _checkpoint_model(ModelRef(step=reference, dtype="float32"), planned, place)
    ref = recipe.models.get(reference)
    if ref is None:
        known = [*recipe.models, *(n for n, step in planned.items() if step.makes_model)]
        raise ConfigError(
            f"{place}: '{reference}' is neither under 'models' nor an earlier checkpoint; "
            f"there are: {', '.join(known) or 'none'}"
        )
    if ref.step is not None:
        return _checkpoint_model(ref, planned, f"models.{reference}.step")
    adapter = None if ref.adapter is None else Path(ref.adapter).expanduser()
    trusted = bool(ref.trust_remote_code)
    identity = model_identity(
        ref.folder,
        dtype=ref.dtype,
        engine=ref.engine,
        adapter=adapter,
        trust_remote_code=trusted,
    )
    vocabulary = vocabulary_fingerprint(ref.folder)
    return Model(ref.folder, ref.dtype, ref.engine, identity, vocabulary, adapter, trusted)


def _checkpoint_model(ref: ModelRef, planned: Mapping[str, PlannedStep], place: str) -> Model:
    step = planned.get(ref.step or "")
    if step is None or not step.makes_model:
        raise ConfigError(f"{place}: '{ref.step}' is not an earlier step that makes a checkpoint")
    identity = {"step": step.fingerprint, "dtype": ref.dtype, "engine": ref.engine}
    base, adapter = step.place, None
    if step.stage.adapts is not None:
        base, adapter = step.models[step.stage.adapts].base, step.place
    return Model(base, ref.dtype, ref.engine, identity, step.vocabulary, adapter)


def needs(plan: Sequence[PlannedStep], step: PlannedStep) -> list[PlannedStep]:
    """Return the steps whose tables or checkpoints ``step`` reads."""
    folders = {source.place for source in step.inputs}
    folders |= {model.base for model in step.models.values()}
    folders |= {model.adapter for model in step.models.values() if model.adapter is not None}
    return [other for other in plan if other.place in folders]
