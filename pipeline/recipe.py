"""One YAML file: a Recipe (all that changes bytes; hashed) and an Execution (where; never hashed).

Unknown keys are errors with their path. ``${NAME}`` in a text is taken from the environment, with
``${NAME:-default}`` for a default; ``--set a.b=value`` changes a value before anything is checked.
"""

import os
import re
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from schemas.errors import ConfigError
from schemas.storage.files import Folder, as_folder
from stages.models.spec import EngineOptions
from stages.registry import Step
from stages.stage import StageConfig


class ModelRef(StageConfig):
    """A model to run: a local folder, or the checkpoint that an earlier step makes.

    ``adapter`` is the folder of a PEFT adapter on a ``path`` model.
    """

    path: str | None = None
    step: str | None = None
    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    engine: Literal["vllm", "transformers"] = "vllm"

    @model_validator(mode="after")
    def _one_place(self) -> "ModelRef":
        if (self.path is None) == (self.step is None):
            raise ValueError("give either 'path' (a model folder) or 'step' (a step's name)")
        if self.adapter is not None and self.path is None:
            raise ValueError("'adapter' goes with 'path', the model folder it was trained on")
        return self

    @property
    def folder(self) -> Path:
        """The local folder of a ``path`` model."""
        assert self.path is not None
        return Path(self.path).expanduser()


def _root(place: object) -> object:
    if not isinstance(place, str | Folder):
        return place
    try:
        folder = as_folder(place)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return folder.expanduser().absolute() if isinstance(folder, Path) else folder


Root = Annotated[Folder, BeforeValidator(_root), PlainSerializer(str)]


class Execution(StageConfig):
    """Where and how wide a recipe runs. Nothing here changes what is written.

    ``root`` is a folder, or a place in an object store such as ``s3://bucket/prefix``.
    ``address`` is a Ray cluster's (``auto``, ``host:port``, ``ray://host:port``); without one,
    executor ``ray`` starts a Ray of its own. A shard may cost ``max_attempts`` workers before its
    rows are looked at one by one; ``shard_timeout_s`` is how long a worker may take for one. A
    scheduler gives each of its tasks ``group_size`` shards.
    """

    root: Root = Field(default=Path("cache"), validate_default=True)
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: int = Field(default=1, ge=1)
    training_processes: int = Field(default=1, ge=1)
    group_size: int = Field(default=16, ge=1)
    max_attempts: int = Field(default=3, ge=1)
    shard_timeout_s: float | None = Field(default=None, gt=0.0)
    engine: EngineOptions = EngineOptions()


class Schedule(StageConfig):
    """When Airflow runs a recipe, and how hard it tries; ``airflow_dags`` reads it as it stands.

    Nothing here changes what is written, and variables are not put in. docs/airflow.md tells what
    each setting does.
    """

    cron: str | None = None
    start_date: date = date(2026, 1, 1)
    catchup: bool = False
    max_active_runs: int = Field(default=1, ge=1)
    max_parallel_groups: int | None = Field(default=None, ge=1)
    tags: tuple[str, ...] = ()
    pool: str = "default_pool"
    retries: int = Field(default=3, ge=0)
    retry_delay_s: float = Field(default=60.0, gt=0.0)
    timeout_minutes: float | None = Field(default=None, gt=0.0)
    deadline_minutes: float | None = Field(default=None, gt=0.0)
    runner: Literal["local", "ray", "kubernetes"] = "local"


class Recipe(StageConfig):
    """What to make: models, and named steps in an order in which each finds what it needs."""

    NAME_PATTERN: ClassVar[str] = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"

    name: str = Field(pattern=NAME_PATTERN)
    models: dict[str, ModelRef] = Field(default_factory=dict)
    steps: dict[str, Step] = Field(min_length=1)
    execution: Execution = Execution()
    schedule: Schedule = Schedule()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; raises ConfigError, in one line, for anything wrong with it."""
    try:
        body = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_yaml_place(error)}") from error
    if not isinstance(body, dict):
        raise ConfigError(f"{path} holds a {type(body).__name__}, expected a mapping with 'steps'")
    for override in overrides:
        _override(body, override)
    body = _expand(body, str(path))
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_problems(error, body)}") from error


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key given twice, where YAML would let the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = f"the key '{key.value}' is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _yaml_place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _problems(error: ValidationError, body: dict[str, Any]) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(_path_in(body, problem["loc"])) or "recipe"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "no such setting; check the spelling"
        elif problem["type"] == "union_tag_invalid":
            found, known = problem["ctx"]["tag"], problem["ctx"]["expected_tags"].replace("'", "")
            message = f"Input tag '{found}' found, expected one of {known}"
        lines.append(f"{place}: {message}")
    return "; ".join(lines)


def _path_in(body: Any, location: Sequence[str | int]) -> Iterator[str]:
    """Yield a problem's path as the recipe spells it: without the names of union members."""
    for part in location:
        if isinstance(body, dict) and part not in body and part in body.values():
            continue
        yield str(part)
        inside = isinstance(body, list) or (isinstance(body, dict) and part in body)
        body = body[part] if inside else None


def _override(body: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set takes path=value (such as execution.workers=2), got '{override}'")
    try:
        value = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {name}: '{text}' is not a YAML value: {_yaml_place(error)}"
        ) from error
    *parents, last = name.split(".")
    place: Any = body
    for parent in parents:
        place = _child(place, parent, name)
    if isinstance(place, list):
        _child(place, last, name)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ConfigError(f"--set {name}: '{'.'.join(parents)}' is a value, not a mapping")


def _child(place: Any, key: str, name: str) -> Any:
    if isinstance(place, list):
        if not key.isdigit() or int(key) >= len(place):
            raise ConfigError(f"--set {name}: '{key}' is not an index below {len(place)}")
        return place[int(key)]
    if not isinstance(place, dict):
        raise ConfigError(f"--set {name}: '{key}' lies inside a value, not a mapping")
    return place.setdefault(key, {})


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _expand(value: Any, place: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, f"{place}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, place) for item in value]
    return (
        _VARIABLE.sub(lambda match: _variable(match, place), value)
        if isinstance(value, str)
        else value
    )


def _variable(match: re.Match[str], place: str) -> str:
    found = os.environ.get(match[1], match[2])
    if found is None:
        raise ConfigError(f"{place}: the environment variable {match[1]} is not set")
    return found
