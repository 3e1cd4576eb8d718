"""Two schemas that a value must both satisfy, as one; and whether no value can satisfy both. For allOf, oneOf and keywords beside anyOf."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from yarn_edge.engine.grammar.values import Schema, SchemaError, place_in

MAX_ENUM, MAX_ALTERNATIVES, MAX_PROPERTIES, MAX_NAME = 1000, 64, 500, 256

# Keywords that only describe. $defs and definitions are read where $ref points to them.
_SCHEMA_NOTES = ("$schema", "$id", "$comment", "$defs", "definitions", "contentEncoding", "contentMediaType")
_API_NOTES = ("example", "discriminator", "xml", "externalDocs", "strict")  # of OpenAPI, and of tools
NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", *_SCHEMA_NOTES, *_API_NOTES)
)
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_HALF = re.compile("[\ud800-\udfff]")
_LARGER: Callable[[Any, Any], Any] = max
_SMALLER: Callable[[Any, Any], Any] = min
_BOUNDS = {
    **dict.fromkeys(("minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum"), _LARGER),
    **dict.fromkeys(("maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum"), _SMALLER),
}


def is_note(keyword: str) -> bool:
    """Whether a keyword asserts nothing."""
    return keyword in NOTES or keyword.startswith("x-")


def types_of(schema: Schema) -> tuple[str, ...]:
    """The types that its `type` allows; all, if it has none."""
    given = schema.get("type", TYPES)
    return (given,) if isinstance(given, str) else tuple(given)


def check_shape(schema: Schema, at: str) -> None:
    """Raises SchemaError unless the values of the keywords that are read here are of the right kind. at: the place of the schema."""
    kinds = schema.get("type", "null")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not all(isinstance(k, str) and k in TYPES for k in kinds):
        raise SchemaError(place_in(at, "type"), f"is not one of {', '.join(TYPES)}, or a list of them")
    for keyword in ("anyOf", "oneOf", "allOf", "enum", "prefixItems"):
        most = MAX_ENUM if keyword == "enum" else MAX_ALTERNATIVES
        value = schema.get(keyword, [0])
        if not isinstance(value, list) or not 0 < len(value) <= most:
            raise SchemaError(place_in(at, keyword), f"is not a list of 1 to {most}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or len(properties) > MAX_PROPERTIES:
        raise SchemaError(place_in(at, "properties"), f"is not an object of at most {MAX_PROPERTIES} properties")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise SchemaError(place_in(at, "required"), "is not a list of names")
    for name in [*properties, *required]:
        if len(name) > MAX_NAME or _HALF.search(name):
            raise SchemaError(
                place_in(at, "properties"), f"has a name of over {MAX_NAME} characters or half a character"
            )


def both(one: Schema, other: Schema, at: str) -> dict[str, Any] | str:
    """One schema for what satisfies both; or the keyword that cannot be merged. Raises SchemaError for what is no schema."""
    check_shape(one, at)
    check_shape(other, at)
    merged = {key: value for key, value in one.items() if not is_note(key)}
    for key, value in other.items():
        if is_note(key) or (key in merged and _same(merged[key], value)):
            continue
        if key not in merged:
            merged[key] = value
        elif key in _BOUNDS and all(isinstance(bound, (int, float)) for bound in (merged[key], value)):
            merged[key] = _BOUNDS[key](merged[key], value)
        elif key == "required":
            merged[key] = [*merged[key], *value]
        elif key == "enum":
            merged[key] = [item for item in merged[key] if any(_same(item, known) for known in value)]
        elif key == "type":
            merged[key] = _common_types(types_of(one), types_of(other))
        elif key == "properties":
            properties = dict(merged[key])
            for name, schema in value.items():
                properties[name] = _both_members(properties.get(name, True), schema, _place_of(name, at))
                if isinstance(properties[name], str):
                    return key
            merged[key] = properties
        else:
            return key
    closed = [s for s in (one, other) if s.get("additionalProperties", True) is not True]
    if closed and not _same(sorted(one.get("properties", ())), sorted(other.get("properties", ()))):
        return "additionalProperties"
    return merged


def _both_members(one: Any, other: Any, at: str) -> Any:
    if one is True or other is True:
        return other if one is True else one
    return both(one, other, at) if isinstance(one, Mapping) and isinstance(other, Mapping) else "properties"


def _place_of(name: str, at: str) -> str:
    return place_in(place_in(at, "properties"), name)


def _common_types(one: tuple[str, ...], other: tuple[str, ...]) -> list[str]:
    common = [kind for kind in one if kind in other]
    if "integer" not in common and any("integer" in a and "number" in b for a, b in ((one, other), (other, one))):
        common.append("integer")
    return common


def apart(one: Schema, other: Schema, at: str) -> bool:
    """Whether no value satisfies both, as far as can be seen from types, constants and the properties of objects.

    Raises SchemaError for what is no schema.
    """
    check_shape(one, at)
    check_shape(other, at)
    kinds, others = set(types_of(one)), set(types_of(other))
    if "number" in kinds | others:
        kinds, others = ({*s, "integer"} if "number" in s else s for s in (kinds, others))
    common = kinds & others
    if not common:
        return True
    values, known = _constants(one), _constants(other)
    if values is not None and known is not None:
        return not any(_same(a, b) for a in values for b in known)
    if common != {"object"}:
        return False
    for schema, against in ((one, other), (other, one)):
        for name in schema.get("required", ()):
            if against.get("additionalProperties") is False and name not in against.get("properties", {}):
                return True
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    return any(_member_apart(one, other, name, at) for name in shared)


def _member_apart(one: Schema, other: Schema, name: str, at: str) -> bool:
    members = [schema.get("properties", {}).get(name) for schema in (one, other)]
    if not all(isinstance(member, Mapping) for member in members):
        return False
    return apart(members[0], members[1], _place_of(name, at))


def _constants(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return list(schema["enum"]) if isinstance(schema.get("enum"), list) else None


def _same(one: Any, other: Any) -> bool:
    """Whether they are the same JSON value: 1 and 1.0 are, 1 and true are not."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
