"""A recipe's YAML file, read: ``--set`` and variables put in, every problem said in one line.

``${NAME}`` in a text is taken from the environment, with ``${NAME:-default}`` for a default;
``--set a.b=value`` changes a value before anything is checked.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.planning.recipe import Recipe
from schemas.errors import ConfigError


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


def _child(place: Any, key: str, name: str) -> Any:
    if isinstance(place, list):
        if not key.isdigit() or int(key) >= len(place):
            raise ConfigError(f"--set {name}: '{key}' is not an index below {len(place)}")
        return place[int(key)]
    if not isinstance(place, dict):
        raise ConfigError(f"--set {name}: '{key}' lies inside a value, not a mapping")
    return place.setdefault(key, {})
