"""Which settings a recipe has at a place, and which of them a misspelt one may have meant."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from pipeline.planning.recipe import Recipe

Schema = dict[str, Any]


def nearest_settings(location: Sequence[str | int]) -> str:
    """Return what to say of an unknown setting: the nearest one there is, or all of them.

    ``location`` is pydantic's: keys, indices and the names of union members; the setting last.
    """
    *parents, wrong = location
    recipe = _schema()
    found = [recipe]
    for part in parents:  # one that leads nowhere is a name that pydantic gives a union's member
        found = [inner for each in found for inner in _inside(each, part, recipe["$defs"])] or found
    names = sorted({name for each in found for name in each.get("properties", {})})
    near = get_close_matches(str(wrong), names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names)}"


@cache
def _schema() -> Schema:
    return Recipe.model_json_schema(schema_generator=_OfAnyType)


class _OfAnyType(GenerateJsonSchema):
    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Schema:
        return {}  # a type that only Python has, such as a place in an object store


def _inside(schema: Schema, part: str | int, named: dict[str, Schema]) -> Iterator[Schema]:
    """Yield what may lie at a part of a location: a setting, an item, a union's member by tag."""
    if part in schema.get("tags", ()):
        yield schema
    elif part in schema.get("properties", {}):
        yield from _members(schema["properties"][part], named)
    else:
        for of_any in ("additionalProperties", "items"):
            if isinstance(schema.get(of_any), dict):
                yield from _members(schema[of_any], named)


def _members(schema: Schema, named: dict[str, Schema], *tags: str) -> Iterator[Schema]:
    """Yield a schema that a name stands for, or all members of a union with their tags."""
    by_tag = schema.get("discriminator", {}).get("mapping", {})
    if reference := schema.get("$ref"):
        yield from _members(named[reference.rpartition("/")[2]], named, *tags)
    elif union := schema.get("anyOf") or schema.get("oneOf"):
        for member in union:
            own = [tag for tag, tagged in by_tag.items() if tagged == member.get("$ref")]
            yield from _members(member, named, *own)
    else:
        yield {**schema, "tags": tags}
