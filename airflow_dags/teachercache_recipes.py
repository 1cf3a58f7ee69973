"""Recipes as the DAGs see them: names, steps, what needs what, when to run.

Enough is read to draw a graph; all else of a recipe is checked by the ``teachercache`` command.
What that package knows of its stages is in ``teachercache_stages``.
"""

import datetime
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from teachercache_rounds import Training, with_rounds
from teachercache_stages import KINDS, REFERENCES

RUNNERS = ("local", "ray", "kubernetes")
OWN_TASKS = ("plan", "verify", "publish", "report")
_PLACE = ("path", "revision", "adapter")  # of a model that no step makes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class RecipeError(Exception):
    """What is wrong with a recipe's file, in one line that names the file and the line in it."""


@dataclass(frozen=True)
class Schedule:
    """The recipe's ``schedule`` block: when Airflow runs it, and how hard it tries.

    ``cron`` is in UTC, None for runs by hand only; a run is about the interval before it, whose
    first day is ``DS``. ``pool`` holds the steps that load models. ``timeout_minutes`` ends a task,
    ``deadline_minutes`` only tells that a run takes longer.
    """

    cron: str | None = None
    start_date: datetime.date = datetime.date(2026, 1, 1)
    catchup: bool = False
    max_active_runs: int = 1
    max_parallel_groups: int | None = None
    tags: tuple[str, ...] = ()
    pool: str = "default_pool"
    retries: int = 3
    retry_delay_s: float = 60.0
    timeout_minutes: float | None = None
    deadline_minutes: float | None = None
    runner: str = "local"


@dataclass(frozen=True)
class Step:
    """A step: its name, what it does, and the earlier steps that it needs.

    ``runs_model`` is of a table that a model makes, such as a teacher's signals.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    runs_model: bool = False


@dataclass(frozen=True)
class Recipe:
    """One recipe's file."""

    name: str
    path: Path
    text: str
    steps: Mapping[str, Step]
    schedule: Schedule = field(default_factory=Schedule)
    lines: Mapping[str, int] = field(default_factory=dict)  # where each schedule setting stands

    def error(self, key: str, problem: str) -> RecipeError:
        """Return what is wrong with a setting of the schedule."""
        return RecipeError(f"{self.path}, line {self.lines[key]}: schedule.{key} {problem}")

    @property
    def cache_steps(self) -> list[Step]:
        """The steps that make tables, and the checkpoints that tables are made with."""
        wanted = [step for step in self.steps.values() if step.kind in ("source", "table")]
        names: set[str] = set()
        while wanted:
            step = wanted.pop()
            names.add(step.name)
            wanted += [self.steps[name] for name in step.needs if name not in names]
        return [step for step in self.steps.values() if step.name in names]

    @property
    def training_steps(self) -> list[Step]:
        """All other steps: they train and measure students."""
        cached = {step.name for step in self.cache_steps}
        return [step for step in self.steps.values() if step.name not in cached]


def read_folder(folder: Path) -> tuple[list[Recipe], list[str]]:
    """Return the good recipes of a folder, and one line for each of the others."""
    if not folder.is_dir():
        return [], [f"{folder}, the folder of recipes, does not exist: make it or name another"]
    recipes, problems = [], []
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            recipes.append(read_recipe(path))
        except RecipeError as error:
            problems.append(str(error))
    for name, count in Counter(recipe.name for recipe in recipes).items():
        if count > 1:
            paths = " and ".join(str(recipe.path) for recipe in recipes if recipe.name == name)
            problems.append(f"{paths} are both named '{name}': rename one, neither runs until then")
            recipes = [recipe for recipe in recipes if recipe.name != name]
    return recipes, problems


def read_recipe(path: Path) -> Recipe:
    """Read one file; raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, yaml.CSafeLoader)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}, {_yaml_problem(error)}") from error
    top = _Mapping(path, root, "the recipe")
    name = top.require("name").text()
    if not _NAME.fullmatch(name):
        raise top["name"].error(f"name '{name}' has other characters than letters, digits, - and _")
    models = top["models"].children() if "models" in top else {}
    made_by = {key: model["step"].text() for key, model in models.items() if "step" in model}
    model_of = made_by | {
        key: tuple(model[part].text() for part in _PLACE if part in model)
        for key, model in models.items()
        if key not in made_by
    }
    steps: dict[str, Step] = {}
    named: dict[str, tuple[str, ...]] = {}
    for key, node in top.require("steps").children().items():
        steps[key] = _step(key, node, made_by, steps)
        named[key] = _named(node)
        if (rounds := _rounds(node)) > 1:
            student, data = node.require("student").text(), tuple(node.require("data").texts())
            training = Training(key, student, data, rounds, named, model_of)
            steps = with_rounds(steps, training)
    if not steps:
        raise top["steps"].error("there are no steps")
    if "schedule" not in top:
        return Recipe(name, path, text, steps)
    lines = {key: node.line for key, node in top["schedule"].children().items()}
    return Recipe(name, path, text, steps, _schedule(top["schedule"]), lines)


def _step(
    name: str, node: "_Mapping", made_by: Mapping[str, str], earlier: Mapping[str, Step]
) -> Step:
    stage = node.require("stage").text()
    if stage not in KINDS:
        raise node["stage"].error(f"stage '{stage}' found, expected one of {', '.join(KINDS)}")
    if not _NAME.fullmatch(name) or name in OWN_TASKS:
        raise node.error(
            f"step '{name}' cannot be a task of that name: take another, of letters, digits, - "
            f"and _"
        )
    found = [made_by.get(text, text) for text in _named(node)]
    needs = tuple(dict.fromkeys(text for text in found if text in earlier))
    return Step(name, KINDS[stage], needs, KINDS[stage] == "table" and "model" in node)


def _named(node: "_Mapping") -> tuple[str, ...]:
    """Return the steps and models that a step names."""
    return tuple(text for key in REFERENCES if key in node for text in node[key].texts())


def _rounds(node: "_Mapping") -> int:
    if "rounds" not in node:
        return 1
    text = node["rounds"].text()
    if not text.isdigit() or not int(text):
        raise node["rounds"].error(f"rounds is '{text}', expected a number of at least 1")
    return int(text)


def _schedule(node: "_Mapping") -> Schedule:
    known = {item.name: item for item in fields(Schedule)}
    values: dict[str, Any] = {}
    for key, child in node.children().items():
        if key not in known:
            raise child.error(f"schedule.{key}: no such setting; there are: {', '.join(known)}")
        value = child.value()
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, str(known[key].type), least=0 if key == "retries" else 1):
            expected = str(known[key].type).replace("datetime.", "").replace("tuple", "list")
            raise child.error(f"schedule.{key} is {value!r}, expected {expected}")
        if key == "runner" and value not in RUNNERS:
            raise child.error(f"schedule.runner is '{value}', expected one of {', '.join(RUNNERS)}")
        values[key] = value
    return Schedule(**values)


def _fits(value: Any, annotation: str, *, least: int) -> bool:
    """Whether a YAML value is what the field takes: a count of ``least``, a time above zero."""
    if value is None:
        return "None" in annotation
    if "bool" in annotation or isinstance(value, bool):
        return "bool" in annotation and isinstance(value, bool)
    if "tuple" in annotation:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if "date" in annotation:
        return type(value) is datetime.date
    if "str" in annotation:
        return isinstance(value, str)
    if "float" in annotation:
        return isinstance(value, int | float) and value > 0
    return isinstance(value, int) and value >= least


class _Mapping:
    """A node of the file that knows where it is."""

    def __init__(self, path: Path, node: Any, what: str) -> None:
        self.path, self.node, self.what = path, node, what

    @property
    def line(self) -> int:
        return 1 if self.node is None else int(self.node.start_mark.line) + 1

    def error(self, problem: str) -> RecipeError:
        return RecipeError(f"{self.path}, line {self.line}: {problem}")

    def children(self) -> dict[str, "_Mapping"]:
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error(f"{self.what} is not a mapping")
        try:
            yaml.SafeLoader("").flatten_mapping(self.node)  # ``<<: *anchor``, once
        except yaml.YAMLError as error:
            raise RecipeError(f"{self.path}, {_yaml_problem(error)}") from error
        return {
            key.value: _Mapping(self.path, value, f"'{key.value}'")
            for key, value in self.node.value
        }

    def __contains__(self, key: str) -> bool:
        return key in self.children()

    def __getitem__(self, key: str) -> "_Mapping":
        return self.children()[key]

    def require(self, key: str) -> "_Mapping":
        if key not in self:
            raise self.error(f"{self.what} has no '{key}'")
        return self[key]

    def text(self) -> str:
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.error(f"{self.what} is not a text")
        return str(self.node.value)

    def texts(self) -> Iterator[str]:
        """Yield a text, or all texts of a list or of a mapping's values."""
        if isinstance(self.node, yaml.ScalarNode):
            yield str(self.node.value)
        elif isinstance(self.node, yaml.SequenceNode):
            yield from (str(item.value) for item in self.node.value)
        else:
            yield from (text for child in self.children().values() for text in child.texts())

    def value(self) -> Any:
        loader = yaml.SafeLoader("")
        return loader.construct_object(self.node, deep=True)


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark else problem
