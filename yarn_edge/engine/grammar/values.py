"""Strings, numbers, arrays and objects as grammars, by the keywords that are about them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from yarn_edge.engine.grammar.digits import NUMBER, integers, numbers
from yarn_edge.engine.grammar.patterns import FORMATS, RAW, PatternError, StringPattern, json_char
from yarn_edge.engine.grammar.rules import GrammarRules, literal
from yarn_edge.errors import YarnEdgeError, one_line

ANY_DEPTH = 8  # levels of a value of which the schema says nothing
Part = Callable[[Any, str], str]  # a schema and its place -> a rule's name
Schema = Mapping[str, Any]


class SchemaError(YarnEdgeError):
    """A schema of which no grammar is made. at: the place in it, such as properties.city.pattern; fact: the reason."""

    def __init__(self, at: str, fact: str) -> None:
        self.at, self.fact = one_line(at.strip("."), 200), one_line(fact, 300)
        super().__init__(f"{self.at or 'the schema'}: {self.fact}")


class Refusal(Exception):
    """A keyword of the schema at hand cannot be said in a grammar."""

    def __init__(self, keyword: str, fact: str) -> None:
        super().__init__(keyword)
        self.keyword, self.fact = keyword, fact


def place_in(at: str, keyword: str) -> str:
    """The place of a keyword in a schema whose place is `at`."""
    return f"{at}.{keyword}" if at else keyword


def json_kind(value: Any) -> str:
    """The JSON type of a value; of whole numbers: number."""
    if value is None:
        return "null"
    names = ((bool, "boolean"), ((int, float), "number"), (str, "string"), (list, "array"))
    return next((name for kinds, name in names if isinstance(value, kinds)), "object")


class Values:
    """Expressions for values of each type. relaxed: what cannot be said is left out."""

    def __init__(self, rules: GrammarRules, relaxed: bool) -> None:
        self.rules, self.relaxed = rules, relaxed
        self.space = rules.add('| " " | "\\n" [ \\t]{0,20}')
        self._anything: list[str] = []

    def cannot(self, at: str, fact: str) -> None:
        """Raises SchemaError, unless relaxed."""
        if not self.relaxed:
            raise SchemaError(at, fact)

    def anything(self, depth: int = ANY_DEPTH) -> str:
        """Any JSON value, up to that depth of arrays and objects."""
        if not self._anything:
            text = self.rules.add(self.string({}, ""))
            scalars = f'"null" | "true" | "false" | {self.rules.add(NUMBER)} | {text}'
            self._anything.append(self.rules.add(scalars))
            for _ in range(ANY_DEPTH):
                inner = self._anything[-1]
                array = self._list('"["', [inner], 0, None, '"]"')
                self._anything.append(self.rules.add(f"{scalars} | {array} | {self._map(text, inner)}"))
        return self._anything[depth]

    def any_object(self) -> str:
        """Any JSON object."""
        return self._map(self.rules.add(self.string({}, "")), self.anything(ANY_DEPTH - 1))

    def string(self, schema: Schema, at: str) -> str:
        """A string by minLength, maxLength, pattern and format."""
        low, high = _count(schema, "minLength") or 0, _count(schema, "maxLength")
        char = json_char(self.rules)
        pattern, keyword = schema.get("pattern"), "pattern"
        if "format" in schema:
            if pattern is not None:
                raise Refusal("format", "is not supported beside pattern")
            keyword, pattern = "format", FORMATS.get(str(schema["format"]))
            if pattern is None:
                raise Refusal("format", f"is not one of {', '.join(FORMATS)}")
        if pattern is None:
            if high is not None and high < low:
                raise SchemaError(place_in(at, "maxLength"), "is less than minLength")
            return f'"\\"" {self.rules.repeat(char, low, high)} "\\""' if high != 0 else '"\\"\\""'
        if not isinstance(pattern, str):
            raise SchemaError(place_in(at, keyword), "is not text")
        try:
            expression = StringPattern(pattern)
            longest = expression.longest
            if expression.shortest < low:
                raise Refusal("minLength", f"is {low}, the {keyword} allows shorter strings")
            if high is not None and (longest is None or longest > high):
                raise Refusal("maxLength", f"is {high}, the {keyword} allows longer strings")
            return f'"\\"" {expression.expression(self.rules)} "\\""'
        except PatternError as error:
            raise Refusal(keyword, str(error)) from None

    def number(self, schema: Schema, at: str, kind: str) -> str:
        """A number by its bounds."""
        low, open_low = _bound(schema, "minimum", "exclusiveMinimum", max)
        high, open_high = _bound(schema, "maximum", "exclusiveMaximum", min)
        if (step := schema.get("multipleOf")) is not None and not (kind == "integer" and step in (1, 1.0)):
            raise Refusal("multipleOf", "is not supported")
        text = (integers if kind == "integer" else numbers)(low, high, open_low, open_high)
        if text is None:
            raise SchemaError(place_in(at, "minimum"), "and maximum leave no number that can be written")
        return text

    def array(self, schema: Schema, at: str, part: Part) -> str:
        """An array by items, prefixItems, minItems and maxItems."""
        low, high = _count(schema, "minItems") or 0, _count(schema, "maxItems")
        if schema.get("uniqueItems") and (high is None or high > 1):
            raise Refusal("uniqueItems", "is not supported")
        if high is not None and high < low:
            raise SchemaError(place_in(at, "maxItems"), "is less than minItems")
        first, items = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(items, list):
            first, items = items, schema.get("additionalItems", True)
        names = [part(s, f"{place_in(at, 'prefixItems')}[{n}]") for n, s in enumerate(first)]
        if high is not None:
            names = names[:high]
        if items is False:
            if low > len(names):
                raise SchemaError(place_in(at, "minItems"), f"is {low}, only {len(names)} items are allowed")
            high = len(names) if high is None else min(high, len(names))
        if items is not False and (high is None or high > len(names)):
            names.append(part(items, place_in(at, "items")))
        return self._list('"["', names, low, high, '"]"')

    def object(self, schema: Schema, at: str, part: Part) -> str:
        """An object by its properties and those that are required."""
        properties, required = dict(schema.get("properties", {})), dict.fromkeys(schema.get("required", ()))
        if "unevaluatedProperties" in schema:  # other schemas that evaluate properties are merged into this one
            schema = {"additionalProperties": schema["unevaluatedProperties"], **schema}
        more = schema.get("additionalProperties", not properties if "properties" not in schema else False)
        missing = [name for name in required if name not in properties]
        if missing and schema.get("additionalProperties", True) is False:
            raise SchemaError(place_in(at, "required"), f"asks for {missing[0]!r}, which additionalProperties forbids")
        for name in missing:
            properties[name] = schema.get("additionalProperties", True)
        properties = {name: s for name, s in properties.items() if s is not False or name in required}
        low, high = _count(schema, "minProperties") or 0, _count(schema, "maxProperties")
        if low > len(required):
            raise Refusal("minProperties", f"is {low}, only {len(required)} are required")
        if high is not None and properties and high < len(properties) + (more is not False):
            raise Refusal("maxProperties", f"is {high}, less than all properties")
        others = None
        if more is not False:
            value = part(more, place_in(at, "additionalProperties"))
            key = self.rules.but_none_of(properties, RAW, literal('"'))
            others = f'"\\"" {key} {self._colon()} {value}'
        if not properties:
            return '"{}"' if others is None or high == 0 else self._members(self.rules.add(others), high)
        others_and_most = None if others is None else (others, None if high is None else high - len(properties))
        return self._fields([(n, s, n in required) for n, s in properties.items()], others_and_most, at, part)

    def _fields(
        self, fields: list[tuple[str, Any, bool]], others: tuple[str, int | None] | None, at: str, part: Part
    ) -> str:
        """Two chains of rules from the last property to the first: with and without a member before.

        others: members that may follow, and how many at most.
        """
        comma = f'"," {self.space}'
        end = f'{self.space} "}}"'
        after, first = end, end
        if others is not None:
            other, most = self.rules.add(others[0]), others[1]
            rest = self.rules.add(f"{comma} {other}")
            after = self.rules.add(f"{self.rules.repeat(rest, 0, most)} {end}")
            less = self.rules.repeat(rest, 0, None if most is None else most - 1)
            first = self.rules.add(f"{other} {less} {end} | {end}")
        for name, schema, is_required in reversed(fields):
            value = part(schema, place_in(place_in(at, "properties"), name))
            member = self.rules.add(f"{literal(json.dumps(name, ensure_ascii=False))} {self._colon()} {value}")
            ways = [f"{member} {after}"] + ([] if is_required else [first])
            more = [f"{comma} {member} {after}"] + ([] if is_required else [after])
            first, after = self.rules.add(" | ".join(ways)), self.rules.add(" | ".join(more))
        return f'"{{" {self.space} {first}'

    def _colon(self) -> str:
        return f'":" {self.space}'

    def _map(self, key: str, value: str) -> str:
        return self._members(self.rules.add(f"{key} {self._colon()} {value}"), None)

    def _members(self, member: str, high: int | None) -> str:
        return self._list('"{"', [member], 0, high, '"}"')

    def _list(self, opening: str, names: list[str], low: int, high: int | None, closing: str) -> str:
        """Items between commas, of which the last one of `names` may be repeated beyond their number."""
        end = f"{self.space} {closing}"
        if high == 0 or not names:
            return f"{opening} {end}"
        comma = f'"," {self.space}'
        fixed, last = len(names), self.rules.add(f"{comma} {names[-1]}")
        least, most = max(low - fixed, 0), None if high is None else max(high - fixed, 0)
        rest = self.rules.repeat(last, least, most) if most != 0 else ""
        tail = self.rules.add(f"{rest} {end}")
        for n in range(fixed - 1, 0, -1):
            tail = self.rules.add(f"{comma} {names[n]} {tail}" + ("" if low > n else f" | {end}"))
        return (
            f"{opening} {self.space} {names[0]} {tail}"
            if low
            else self.rules.add(f"{opening} ({end} | {self.space} {names[0]} {tail})")
        )


def _count(schema: Schema, keyword: str) -> int | None:
    value = schema.get(keyword)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value % 1 != 0:
        raise SchemaError(keyword, f"is {value!r}, not a count")
    return int(value)


def _bound(
    schema: Schema, inclusive: str, exclusive: str, tighter: Callable[[Fraction, Fraction], Fraction]
) -> tuple[Fraction | None, bool]:
    """(the bound, whether it is excluded)."""
    found: list[tuple[Fraction, bool]] = []
    for keyword, is_open in ((inclusive, False), (exclusive, True)):
        value = schema.get(keyword)
        if value is None:
            continue
        if isinstance(value, bool):  # draft 4: exclusiveMinimum: true
            raise Refusal(keyword, "is true or false, as in draft 4: give a number")
        if not isinstance(value, int) and not (isinstance(value, float) and math.isfinite(value)):
            raise SchemaError(keyword, f"is {value!r}, not a finite number")
        found.append((Fraction(repr(value) if isinstance(value, float) else value), is_open))
    if not found:
        return None, False
    bound = found[0][0] if len(found) == 1 else tighter(found[0][0], found[1][0])
    return bound, any(is_open and value == bound for value, is_open in found)
