"""``rounds: n`` of a training step: its student answers, is scored and is trained on, n times over.

One round is the training step with those tables among what leads to its ``data`` that its student
makes, and the tables made of them. In the first round they are what the recipe says; in each later
one the student is what the round before has trained. All rounds become ordinary steps of a recipe,
each with its own name (``student-r1``, ``said-r2``), so whatever plans, runs, shows or schedules
steps knows nothing of rounds. The last round has the plain names: what stands behind it in the
recipe reads its student and its tables. A name is no part of a fingerprint, so one round more makes
that round alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.planning.recipe import ModelRef, Recipe
from schemas.errors import ConfigError
from stages.registry import Step
from stages.stage import TableStage
from stages.student.train.stage import TrainStage

Models = Mapping[str, ModelRef]


def with_rounds(recipe: Recipe) -> Recipe:
    """Return the recipe with a step for each round of each of its training steps.

    Raises ConfigError where a second round would be no other than the first.
    """
    steps: dict[str, Step] = {}
    models = dict(recipe.models)
    for name, stage in recipe.steps.items():
        if not isinstance(stage, TrainStage) or stage.rounds == 1:
            steps[name] = stage
            continue
        within = tuple(_within(stage, steps, models))
        _require_rounds(name, stage, within, steps)
        once = {**{table: steps.pop(table) for table in within}, name: stage}
        for number in range(1, stage.rounds + 1):
            _add_round(number, once, name, steps, models)
    return recipe.model_copy(update={"steps": steps, "models": models})


def round_name(name: str, number: int, rounds: int) -> str:
    """Return what a step is called in one round: the plain name in the last."""
    return name if number == rounds else f"{name}-r{number}"


def _within(stage: TrainStage, steps: Mapping[str, Step], models: Models) -> Iterator[str]:
    """Yield the tables that every round makes anew, in their order."""
    leading, wanted = set(), list(stage.data)
    while wanted:
        name = wanted.pop()
        table = steps.get(name)
        if name not in leading and isinstance(table, TableStage):
            leading.add(name)
            wanted += [ref for _, ref in table.named(table.READS)]
    student = _who(stage.student, models)
    found: set[str] = set()
    for name, table in steps.items():
        if name not in leading:
            continue
        reads = {ref for _, ref in table.named(table.READS)}
        runs = {_who(ref, models) for _, ref in table.named((*table.RUNS, *table.ALSO_RUNS))}
        if student in runs or reads & found:
            found.add(name)
            yield name


def _who(reference: str, models: Models) -> Any:
    """Return the model that a reference means, whatever dtype and engine it is run in."""
    model = models.get(reference)
    if model is None:
        return reference  # a step that makes one
    return model.step or (model.path, model.revision, model.adapter)


def _require_rounds(
    name: str, stage: TrainStage, within: tuple[str, ...], steps: Mapping[str, Step]
) -> None:
    if not within:
        raise ConfigError(
            f"steps.{name}.rounds: is {stage.rounds}, and none of the tables that lead to its data "
            f"is made by its student '{stage.student}', so each round would read the same rows: "
            f"leave it out, or let the student answer (stage responses)"
        )
    for other, step in steps.items():
        named = {ref for _, ref in step.named((*step.READS, *step.RUNS, *step.ALSO_RUNS))}
        if other not in within and (read := named & set(within)):
            raise ConfigError(
                f"steps.{other}: reads '{min(read)}', which every round of '{name}' makes anew: "
                f"put it behind '{name}', where it reads the last round's"
            )


def _add_round(
    number: int,
    once: Mapping[str, Step],
    trained: str,
    steps: dict[str, Step],
    models: dict[str, ModelRef],
) -> None:
    """Add the steps of one round, and the student that it begins with as its steps name it."""
    stage = once[trained]
    assert isinstance(stage, TrainStage)
    tables = {name: round_name(name, number, stage.rounds) for name in once}
    students: dict[str, str] = {}
    if number > 1:
        before = round_name(trained, number - 1, stage.rounds)
        student = _who(stage.student, models)
        for step in once.values():
            for _, ref in step.named((*step.RUNS, *step.ALSO_RUNS)):
                if _who(ref, models) == student and ref not in students:
                    students[ref] = _student_of_round(ref, before, number, models)
    for name, step in once.items():
        if tables[name] in steps:
            raise ConfigError(
                f"steps.{trained}.rounds: a step of the recipe is called '{tables[name]}', as a "
                f"round of '{name}' is: rename it"
            )
        renamed: Any = step
        for setting in step.READS:
            renamed = _renamed(renamed, setting, tables)
        for setting in (*step.RUNS, *step.ALSO_RUNS):
            renamed = _renamed(renamed, setting, students)
        if name == trained:
            renamed = renamed.model_copy(update={"rounds": 1})
        steps[tables[name]] = renamed


def _student_of_round(ref: str, before: str, number: int, models: dict[str, ModelRef]) -> str:
    """Return the name of what the round before trained, run as the recipe runs its first one."""
    first = models.get(ref)
    if first is None:
        return before
    name = f"{ref}-r{number}"
    if name in models:
        raise ConfigError(f"models.{name}: is called as the '{ref}' of a round is: rename it")
    models[name] = ModelRef(step=before, dtype=first.dtype, engine=first.engine)
    return name


def _renamed(config: Any, setting: str, names: Mapping[str, str]) -> Any:
    """Return a configuration in which a setting (a dot leads into a part) names others."""
    first, _, rest = setting.partition(".")
    value = getattr(config, first, None)
    if not names or value is None:
        return config
    if rest:
        value = _renamed(value, rest, names)
    elif isinstance(value, str):
        value = names.get(value, value)
    else:
        value = tuple(names.get(name, name) for name in value)
    return config.model_copy(update={first: value})
