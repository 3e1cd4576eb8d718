"""A JSON schema as a grammar: each keyword, and what it means for the text.

Objects have their properties in the schema's order; without `additionalProperties`, only those that are listed. White space is what
models write: one space or one line break with up to twenty spaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from yarn_edge.engine.grammar.merge import TYPES, apart, both, check_shape, is_note, types_of
from yarn_edge.engine.grammar.rules import GrammarLimitError, GrammarRules, literal
from yarn_edge.engine.grammar.values import Refusal, Schema, SchemaError, Values, json_kind, place_in

MAX_DEPTH, MAX_NODES, MAX_SCHEMA_BYTES = 48, 4000, 256 << 10
_KEYWORDS = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "minProperties",
        "maxProperties",
        "unevaluatedProperties",
    ),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "additionalItems"),
}
_OF = {keyword: kind for kind, keywords in _KEYWORDS.items() for keyword in keywords}
_WHOLE = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}


class SchemaGrammar(Values):
    """The rules of one or several schemas. relaxed: leave out what cannot be said, instead of an error."""

    def __init__(self, rules: GrammarRules, *, relaxed: bool = False) -> None:
        super().__init__(rules, relaxed)
        self._root: Any = {}
        self._refs: dict[str, str] = {}
        self._nodes = 0

    def value(self, schema: Any, at: str = "", root: Any = None) -> str:
        """The name of a rule for the values of a schema. Raises SchemaError, which names the place.

        root: the whole schema, of which `schema` is a part, for its references.
        """
        try:
            size = len(json.dumps(schema))
        except (ValueError, RecursionError, TypeError):
            raise SchemaError(at, "is not JSON") from None
        if size > MAX_SCHEMA_BYTES:
            raise SchemaError(at, f"has {size} bytes, at most {MAX_SCHEMA_BYTES} are possible")
        self._root, self._refs = schema if root is None else root, {}
        try:
            return self.rules.add(self.visit(schema, at, 0, ()))
        except GrammarLimitError as error:
            raise SchemaError(at, str(error)) from None

    def visit(self, schema: Any, at: str, depth: int, open_refs: tuple[str, ...]) -> str:
        """An expression for a schema's values. open_refs: references that are being read without a value in between."""
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise SchemaError(at, f"is too large: at most {MAX_NODES} schemas, {MAX_DEPTH} levels deep, are possible")
        if schema is True or schema == {}:
            return self.anything()
        if not isinstance(schema, Mapping):
            raise SchemaError(at, "is not a schema (an object or true)")
        schema = {key: value for key, value in schema.items() if not is_note(key)}
        for keyword in sorted(schema.keys() - _WHOLE - _OF.keys()):
            self.cannot(place_in(at, keyword), "is not supported")
        check_shape(schema, at)
        for keyword in ("$ref", "allOf", "anyOf", "oneOf"):
            if keyword in schema:
                return getattr(self, f"_{keyword.strip('$').lower()}")(schema, at, depth, open_refs)  # type: ignore[no-any-return]
        if "const" in schema or "enum" in schema:
            return self._enum(schema, at)
        kinds = types_of(schema) if "type" in schema else self._kinds_meant(schema)
        if not kinds:
            raise SchemaError(at, "allows no value")
        ways = [self._typed(kind, schema, at, depth) for kind in dict.fromkeys(kinds)]
        return " | ".join(ways)

    @staticmethod
    def _kinds_meant(schema: Schema) -> tuple[str, ...]:
        """Without a type: those that the keywords are about."""
        return tuple(dict.fromkeys(_OF[keyword] for keyword in schema if keyword in _OF)) or TYPES

    def _ref(self, schema: Schema, at: str, depth: int, open_refs: tuple[str, ...]) -> str:
        ref = schema["$ref"]
        target = self._target(ref, at)
        if ref in open_refs:
            raise SchemaError(place_in(at, "$ref"), "refers to itself")
        others = {key: value for key, value in schema.items() if key != "$ref"}
        if others:
            return self.visit(self._merged(self._part(target, at), others, at), at, depth + 1, (*open_refs, ref))
        if ref not in self._refs:
            self._refs[ref] = name = self.rules.reserve()
            self.rules.define(name, self.visit(target, at, depth + 1, (*open_refs, ref)))
        return self._refs[ref]

    def _target(self, ref: Any, at: str) -> Any:
        """The schema that a reference points to."""
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise SchemaError(place_in(at, "$ref"), "points outside of the schema; only #/… is possible")
        target: Any = self._root
        for part in filter(None, ref.removeprefix("#").split("/")):
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            elif isinstance(target, Mapping) and part in target:
                target = target[part]
            else:
                raise SchemaError(place_in(at, "$ref"), "points to nothing")
        return target

    def _part(self, schema: Any, at: str) -> Any:
        """A schema that stands beside others. It sees nothing of them, so what it does not evaluate is what is additional in it."""
        if not isinstance(schema, Mapping) or schema.get("unevaluatedProperties", True) is True:
            return schema
        if schema.keys() & {"$ref", "allOf", "anyOf", "oneOf"}:
            self.cannot(place_in(at, "unevaluatedProperties"), "is not supported in a part that has parts itself")
        own = dict(schema)
        own.setdefault("additionalProperties", own.pop("unevaluatedProperties"))
        return own

    def _merged(self, one: Any, other: Any, at: str) -> Any:
        """One schema for both; of one that is no object, such as false, itself: `visit` refuses it."""
        if one is True or other is True:
            return other if one is True else one
        if not isinstance(one, Mapping) or not isinstance(other, Mapping):
            return other if isinstance(one, Mapping) else one
        merged = both(one, other, at)
        if isinstance(merged, str):
            self.cannot(place_in(at, merged), "cannot be combined with the same keyword of another schema")
            return {**other, **one}
        return merged

    def _allof(self, schema: Schema, at: str, depth: int, open_refs: tuple[str, ...]) -> str:
        merged: Any = {key: value for key, value in schema.items() if key != "allOf"}
        for n, part in enumerate(schema["allOf"]):
            where = f"{place_in(at, 'allOf')}[{n}]"
            merged = self._merged(merged, self._part(self._resolved(part, where), where), at)
        return self.visit(merged, at, depth + 1, open_refs)

    def _resolved(self, schema: Any, at: str) -> Any:
        """A schema without a $ref at its top."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or set(schema) != {"$ref"}:
                return schema
            schema = self._target(schema["$ref"], at)
        raise SchemaError(place_in(at, "$ref"), "refers to itself")

    def _anyof(self, schema: Schema, at: str, depth: int, open_refs: tuple[str, ...], keyword: str = "anyOf") -> str:
        others = {key: value for key, value in schema.items() if key != keyword}
        places = [f"{place_in(at, keyword)}[{n}]" for n in range(len(schema[keyword]))]
        given = zip(schema[keyword], places, strict=True)
        parts = [self._merged(self._part(part, where), others, at) if others else part for part, where in given]
        ways = [self.visit(part, where, depth + 1, open_refs) for part, where in zip(parts, places, strict=True)]
        return " | ".join(dict.fromkeys(ways))

    def _oneof(self, schema: Schema, at: str, depth: int, open_refs: tuple[str, ...]) -> str:
        parts = [self._resolved(part, f"{place_in(at, 'oneOf')}[{n}]") for n, part in enumerate(schema["oneOf"])]
        for n, part in enumerate(parts):
            for m in range(n):
                where = place_in(at, "oneOf")
                if not (isinstance(part, Mapping) and isinstance(parts[m], Mapping) and apart(part, parts[m], where)):
                    self.cannot(where, f"[{m}] and [{n}] may both be satisfied: use anyOf, or constants")
        return self._anyof(schema, at, depth, open_refs, "oneOf")

    def _enum(self, schema: Schema, at: str) -> str:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if "const" in schema and "enum" in schema:
            self.cannot(place_in(at, "enum"), "is not supported beside const")
        for keyword in schema.keys() - {"type", "enum", "const"}:
            if any(json_kind(value) == _OF.get(keyword) for value in values):
                self.cannot(place_in(at, keyword), "is not supported beside enum or const")
        if "type" in schema:
            kinds = types_of(schema)
            values = [
                v
                for v in values
                if json_kind(v) in kinds or (isinstance(v, int) and "integer" in kinds and json_kind(v) == "number")
            ]
        if not values:
            raise SchemaError(place_in(at, "enum"), "has no value of the type")
        try:
            return " | ".join(
                dict.fromkeys(
                    literal(json.dumps(v, ensure_ascii=False, allow_nan=False).encode().decode()) for v in values
                )
            )
        except UnicodeEncodeError:
            raise SchemaError(place_in(at, "enum"), "has half a character") from None
        except ValueError:
            raise SchemaError(place_in(at, "enum"), "has a number that is not finite") from None

    def _typed(self, kind: str, schema: Schema, at: str, depth: int) -> str:
        try:
            match kind:
                case "null":
                    return '"null"'
                case "boolean":
                    return '"true" | "false"'
                case "string":
                    return self.string(schema, at)
                case "integer" | "number":
                    return self.number(schema, at, kind)
                case "array":
                    return self.array(
                        schema, at, lambda part, where: self.rules.add(self.visit(part, where, depth + 1, ()))
                    )
                case _:
                    return self.object(
                        schema, at, lambda part, where: self.rules.add(self.visit(part, where, depth + 1, ()))
                    )
        except SchemaError as error:
            if at and error.at in schema:  # a keyword's value, without its place
                raise SchemaError(place_in(at, error.at), error.fact) from None
            raise
        except Refusal as refusal:
            self.cannot(place_in(at, refusal.keyword), refusal.fact)
            less = {key: value for key, value in schema.items() if key != refusal.keyword}
            return self._typed(kind, less, at, depth)
