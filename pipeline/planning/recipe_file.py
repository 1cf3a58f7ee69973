"""A recipe's YAML file, read: ``--set`` and variables put in, every problem said in one line.

``${NAME}`` in a text is taken from the environment, with ``${NAME:-default}`` for a default;
``--set a.b=value`` changes a value before anything is checked.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.planning.recipe import Recipe
from pipeline.planning.setting_names import nearest_settings
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
    """Say every problem with its place; what the members of a union expect is one problem."""
    wrong: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for problem in error.errors():
        kind, context = problem["type"], problem.get("ctx", {})
        place = ".".join(_path_in(body, problem["loc"], missing=kind == "missing")) or "recipe"
        if kind == "union_tag_invalid":
            place += f".{context['discriminator'].strip(chr(39))}"
            got[place] = f"got '{context['tag']}', "
            context = {"expected_tags": context["expected_tags"].replace("'", "")}
        elif kind == "extra_forbidden":
            context = {"nearest": nearest_settings(problem["loc"])}
        elif kind in _EXPECTED:
            got[place] = f"got {_shown(problem['input'])}, "
        told = (
            _EXPECTED.get(kind) or _TOLD.get(kind) or problem["msg"].removeprefix("Value error, ")
        )
        wrong.setdefault(place, []).append(told.format_map(context))
    return "; ".join(
        f"{place}: {_one(got.get(place, ''), dict.fromkeys(told))}" for place, told in wrong.items()
    )


_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping of settings"),
    **dict.fromkeys(("path_type", "is_instance_of", "dataclass_type"), "a path"),
    **dict.fromkeys(("date_type", "date_parsing", "date_from_datetime_parsing"), "a date"),
    "string_type": "text",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "at least {min_length} of them",
    "string_pattern_mismatch": "text of the form {pattern}",
    "union_tag_invalid": "one of {expected_tags}",
}
_TOLD = {
    "missing": "this setting is missing",
    "extra_forbidden": "no such setting; {nearest}",
    "union_tag_not_found": "the setting {discriminator} is missing",
}


def _one(got: str, told: Iterable[str]) -> str:
    return f"{got}expected {' or '.join(told)}" if got else "; ".join(told)


def _shown(value: Any) -> str:
    """Return a value as a recipe spells it, or what kind of thing it is where that is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def _path_in(body: Any, location: Sequence[str | int], *, missing: bool) -> Iterator[str]:
    """Yield a problem's path as the recipe spells it: without the names of union members."""
    for at, part in enumerate(location, start=1):
        if not isinstance(body, dict | list):
            return
        if isinstance(body, dict) and part not in body and not (missing and at == len(location)):
            continue
        yield str(part)
        body = body.get(part) if isinstance(body, dict) else body[int(part)]


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
    """Put variables in; refuse what has no stable bytes, which would name no step."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}: got {value}, expected a finite number")
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{place}: the key {odd[0]} is no text: put it in quotes")
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
