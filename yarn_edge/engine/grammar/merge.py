"""Two schemas that a value must both satisfy, as one; and whether no value can satisfy both. For allOf, oneOf and keywords beside anyOf."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]

# Keywords that only describe. $defs and definitions are read where $ref points to them.
_SCHEMA_NOTES = ("$schema", "$id", "$comment", "$defs", "definitions", "contentEncoding", "contentMediaType")
_API_NOTES = ("example", "discriminator", "xml", "externalDocs", "strict")  # of OpenAPI, and of tools
NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", *_SCHEMA_NOTES, *_API_NOTES)
)
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
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


def both(one: Schema, other: Schema) -> dict[str, Any] | str:
    """One schema for what satisfies both; or the keyword that cannot be merged."""
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
                old = properties.get(name, True)
                new = schema if old is True else old if schema is True else _both_or_name(old, schema)
                if isinstance(new, str):
                    return key
                properties[name] = new
            merged[key] = properties
        else:
            return key
    closed = [s for s in (one, other) if s.get("additionalProperties", True) is not True]
    if closed and not _same(sorted(one.get("properties", ())), sorted(other.get("properties", ()))):
        return "additionalProperties"
    return merged


def _both_or_name(one: Any, other: Any) -> Any:
    return both(one, other) if isinstance(one, Mapping) and isinstance(other, Mapping) else "properties"


def _common_types(one: tuple[str, ...], other: tuple[str, ...]) -> list[str]:
    common = [kind for kind in one if kind in other]
    if "integer" not in common and any("integer" in a and "number" in b for a, b in ((one, other), (other, one))):
        common.append("integer")
    return common


def apart(one: Schema, other: Schema) -> bool:
    """Whether no value satisfies both, as far as can be seen from types, constants and the properties of objects."""
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
    return any(_member_apart(one, other, name) for name in shared)


def _member_apart(one: Schema, other: Schema, name: str) -> bool:
    members = [schema.get("properties", {}).get(name) for schema in (one, other)]
    if not all(isinstance(member, Mapping) for member in members):
        return False
    return apart(members[0], members[1])


def _constants(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return list(schema["enum"]) if isinstance(schema.get("enum"), list) else None


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
