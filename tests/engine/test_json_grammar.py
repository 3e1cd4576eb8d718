"""Every text of a schema's grammar is JSON that the schema accepts, says the jsonschema package; what cannot be said is refused."""

from __future__ import annotations

import itertools
import json
import random
import time
from fractions import Fraction
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yarn_edge.engine.constraint import Constraint, json_object_constraint, json_schema_constraint
from yarn_edge.engine.grammar.digits import PLACES, integers, numbers
from yarn_edge.engine.grammar.rules import GrammarRules, literal
from yarn_edge.engine.grammar.schema import SchemaGrammar
from yarn_edge.engine.grammar.values import SchemaError
from yarn_edge.errors import YarnEdgeError

from support.gbnf import Texts

OBJECT = {"type": "object"}
TREE = {
    "$ref": "#/$defs/t",
    "$defs": {
        "t": {
            "properties": {"v": {"type": "integer"}, "of": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
            "required": ["v"],
        }
    },
}

SCHEMAS: dict[str, Any] = {
    "anything": True,
    "empty": {},
    "types": {"type": ["null", "boolean", "integer"]},
    "const": {"const": {"a": [1, '\u20ac"\\', None, 1.5]}},
    "enum": {"enum": ["a\n", 1, None, True, [], "\U0001f9f5"]},
    "enum of a type": {"type": "string", "enum": ["a", 1, "b"]},
    "enum of integers": {"type": "integer", "enum": [1, False, 2, True]},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 4},
    "no length": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d+(\\.x|y?z)*$"},
    "alternatives with anchors": {"type": "string", "pattern": "^ab$|^c|d$"},
    "pattern anywhere": {"type": "string", "pattern": 'a"[^b-y\\s]\\\\'},
    "pattern with lengths": {"type": "string", "pattern": "^.{3,4}$", "minLength": 2, "maxLength": 9},
    "classes": {"type": "string", "pattern": "^\\w\\W\\D\\S[\\d\\s][^\\w]|\\.$"},
    "integer from": {"type": "integer", "minimum": 17},
    "integer to": {"type": "integer", "maximum": -3},
    "integer between": {"type": "integer", "exclusiveMinimum": -12, "exclusiveMaximum": 1205},
    "number from": {"type": "number", "minimum": 0.125},
    "number between": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2.75},
    "number above nine digits": {"type": "number", "minimum": 12345678901.5},
    "array": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"const": "b"}], "items": False, "minItems": 1},
    "tuple of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"const": 1}, {"type": "null"}],
        "additionalItems": {"type": "boolean"},
    },
    "object": {
        "properties": {"a": {"type": "integer"}, "b c": {"type": "null"}, '"': {"type": "boolean"}},
        "required": ["b c"],
        "additionalProperties": False,
    },
    "optional first": {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "required": ["c"]},
    "none required": {"properties": {"a": {"const": 1}, "b": {"const": 2}}},
    "no properties": {"type": "object", "properties": {}},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    "more properties": {
        "type": "object",
        "properties": {"ab": {"const": 1}, "abc": {"const": 2}},
        "required": ["ab"],
        "additionalProperties": {"type": "null"},
    },
    "names that JSON escapes, and others": {
        "properties": {name: {"const": 1} for name in ('a"', "a\\", "a\n", "ab")},
        "additionalProperties": {"const": 2},
    },
    "two more properties": {
        "properties": {"a": {"const": 1}, "b": {"const": 2}},
        "additionalProperties": {"const": 3},
        "maxProperties": 4,
    },
    "one more property": {"properties": {"a": {"const": 1}}, "additionalProperties": {"const": 3}, "maxProperties": 2},
    "unevaluatedProperties": {
        "properties": {"a": {"const": 1}},
        "required": ["b"],
        "unevaluatedProperties": {"type": "integer"},
    },
    "unevaluatedProperties in a part": {
        "properties": {"a": {"type": "integer"}},
        "allOf": [
            {"type": "object", "properties": {"a": {"minimum": 1, "maximum": 9}}, "unevaluatedProperties": False}
        ],
        "required": ["a"],
    },
    "required, not described": {"type": "object", "required": ["x"], "minProperties": 1},
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}], "title": "t"},
    "anyOf beside properties": {
        "type": "object",
        "properties": {"k": {"const": 1}},
        "anyOf": [{"properties": {"a": {"const": 2}}, "required": ["a"]}, {"required": ["k"]}],
    },
    "oneOf by type": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    "oneOf by constant": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": c}, c: {"type": "integer"}}, "required": ["k", c]}
            for c in "ab"
        ]
    },
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}},
            {"properties": {"a": {"maximum": 3}, "b": {"const": 2}}, "required": ["a"]},
        ]
    },
    "reference": {"$defs": {"p": {"type": "integer", "minimum": 0}}, "type": "array", "items": {"$ref": "#/$defs/p"}},
    "a reference beside a description": {
        "definitions": {"p/~": {"type": "null"}},
        "properties": {"a": {"$ref": "#/definitions/p~1~0", "description": "d"}},
    },
    "references in allOf": {
        "properties": {
            "a": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
            "b": {"allOf": [{"$ref": "#/properties/a/anyOf/0"}, {"$ref": "#/definitions/p~1~0"}]},
        },
        "required": ["b"],
        "definitions": {"p/~": {"maximum": 3}},
    },
    "recursion": TREE,
    **{
        name: {"type": "string", "format": name}
        for name in ("date", "time", "date-time", "duration", "uuid", "ipv4", "ipv6", "email", "hostname", "uri")
    },
}


def texts(constraint: Constraint, n: int) -> list[str]:
    draw, of = random.Random(0), Texts(constraint.grammar)
    return [of.one(draw) for _ in range(n)]


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_text_is_valid(schema: Any) -> None:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    found = texts(json_schema_constraint(schema), 30)
    assert len(set(found)) > 1 or schema in (SCHEMAS["const"], SCHEMAS["no length"], SCHEMAS["no properties"])
    for text in found:
        validator.validate(json.loads(text))
        text.encode()


def test_any_object_is_an_object() -> None:
    for text in texts(json_object_constraint(), 20):
        assert isinstance(json.loads(text), dict)


def test_reasoning_may_precede_the_object() -> None:
    constraint = json_object_constraint(after="</think>")
    assert constraint.visible == ("</think>",)
    for text in texts(constraint, 20):
        json.loads(text.partition("</think>")[2])


REFUSED: dict[str, tuple[Any, str]] = {
    "an unknown keyword": ({"properties": {"a": {"contains": {}}}}, "properties.a.contains: is not supported"),
    "not": ({"not": {}}, "not: is not supported"),
    "patternProperties": ({"type": "object", "patternProperties": {}}, "patternProperties: is not supported"),
    "uniqueItems": ({"items": {"uniqueItems": True, "type": "array"}}, "items.uniqueItems: is not supported"),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, "multipleOf: is not supported"),
    "a format": ({"type": "string", "format": "iri"}, "format: is not one of date, time"),
    "format and pattern": (
        {"type": "string", "format": "date", "pattern": "a"},
        "format: is not supported beside pattern",
    ),
    "a pattern that looks ahead": (
        {"properties": {"p": {"type": "string", "pattern": "(?=a)"}}},
        "properties.p.pattern: uses assert",
    ),
    "a pattern that refers back": ({"type": "string", "pattern": "(a)\\1"}, "pattern: uses groupref"),
    "a pattern of words": ({"type": "string", "pattern": "\\bword\\b"}, "pattern: uses at"),
    "a broken pattern": ({"type": "string", "pattern": "("}, "pattern: is not a regular expression"),
    "a pattern with flags": ({"type": "string", "pattern": "(?i)a"}, "pattern: has flags"),
    "a pattern that may be too long": (
        {"type": "string", "pattern": "^a*$", "maxLength": 3},
        "maxLength: is 3, the pattern allows longer",
    ),
    "oneOf that may be both": (
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        "oneOf: .0. and .1. may both be satisfied",
    ),
    "oneOf that is one number": (
        {"oneOf": [{"const": {"a": [1]}}, {"const": {"a": [1.0]}}]},
        "oneOf: .0. and .1. may both be satisfied",
    ),
    "an infinite enum": ({"enum": [1, 1e400]}, "enum: has a number that is not finite"),
    "an infinite length": ({"type": "string", "minLength": 1e400}, "minLength: is inf, not a count"),
    "an enum beside a length": ({"enum": ["a", "bcd"], "maxLength": 2}, "maxLength: is not supported beside enum"),
    "minProperties": ({"type": "object", "minProperties": 1}, "minProperties: is 1, only 0 are required"),
    "allOf that cannot be one": ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "pattern: cannot be combined"),
    "a reference elsewhere": ({"$ref": "http://a/b"}, r"\$ref: points outside of the schema"),
    "a reference to nothing": ({"properties": {"a": {"$ref": "#/$defs/a"}}}, r"properties.a.\$ref: points to nothing"),
    "a reference to nothing in allOf": ({"allOf": [{"$ref": "#/$defs/a"}]}, r"allOf\[0\].\$ref: points to nothing"),
    "a reference elsewhere in allOf": ({"allOf": [{"$ref": "http://a/b"}]}, r"allOf\[0\].\$ref: points outside"),
    "nothing in allOf": ({"allOf": [{"type": "null"}, False]}, "the schema: is not a schema"),
    "a reference to itself": ({"$ref": "#"}, r"\$ref: refers to itself"),
    "references in a circle": (
        {"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}},
        r"anyOf.0..anyOf.0..\$ref: refers to itself",
    ),
    "no number": ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum: and maximum leave no number"),
    "draft 4": (
        {"type": "number", "exclusiveMinimum": True, "minimum": 1},
        "exclusiveMinimum: is true or false, as in draft 4",
    ),
    "a fraction of a count": (
        {"properties": {"a": {"type": "string", "minLength": 0.5}}},
        "properties.a.minLength: is 0.5, not a count",
    ),
    "no type": ({"type": "text"}, "type: is not one of null, boolean"),
    "no list": ({"anyOf": []}, "anyOf: is not a list of 1 to 64"),
    "no schema": ({"properties": {"a": 1}}, "properties.a: is not a schema"),
    "what is required and forbidden": ({"required": ["a"], "additionalProperties": False}, "required: asks for 'a'"),
    "what is evaluated beside a part, not in it": (
        {"allOf": [{"properties": {"a": {}}, "unevaluatedProperties": False}, {"properties": {"b": {"const": 2}}}]},
        "additionalProperties: cannot be combined",
    ),
    "what is evaluated beside what $ref points to": (
        {
            "$ref": "#/$defs/p",
            "properties": {"b": {}},
            "$defs": {"p": {"properties": {"a": {}}, "unevaluatedProperties": False}},
        },
        "additionalProperties: cannot be combined",
    ),
    "parts in a part that evaluates nothing else": (
        {"properties": {"b": {}}, "allOf": [{"anyOf": [{"type": "object"}], "unevaluatedProperties": False}]},
        r"allOf.0..unevaluatedProperties: is not supported in a part",
    ),
    "what is required and not evaluated": (
        {"type": "object", "required": ["a"], "unevaluatedProperties": False},
        "required: asks for 'a'",
    ),
    **{
        f"no {keyword} in {several}": ({several: [OBJECT, {"type": "object", keyword: value}]}, f".*{keyword}: is not ")
        for several in ("allOf", "oneOf")
        for keyword, value in {"type": 5, "required": 5, "properties": [5], "enum": 5}.items()
    },
}


@pytest.mark.parametrize("schema, expected", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_said_is_refused(schema: Any, expected: str) -> None:
    with pytest.raises(SchemaError, match=f"^{expected}"):
        json_schema_constraint(schema)


RELAXED = (
    "an unknown keyword",
    "uniqueItems",
    "multipleOf",
    "a format",
    "a pattern that looks ahead",
    "oneOf that may be both",
    "minProperties",
)


@pytest.mark.parametrize("name", RELAXED)
def test_a_tool_that_is_not_strict_is_held_to_the_rest(name: str) -> None:
    rules = GrammarRules()
    grammar = rules.text(SchemaGrammar(rules, relaxed=True).value(REFUSED[name][0]))
    draw, of = random.Random(0), Texts(grammar)
    for _ in range(10):
        json.loads(of.one(draw))


def nested(depth: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def doubling(levels: int) -> Any:
    defs = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{levels}": {"type": "null"}}}


HOSTILE: dict[str, Any] = {
    "deep": nested(100),
    "deeper than Python": nested(5000),
    "wide": {"properties": {f"p{n}": {} for n in range(501)}},
    "many": {
        "anyOf": [
            {
                "properties": {
                    f"p{n}": {
                        "type": "object",
                        "properties": {f"q{m}": {"type": "integer", "minimum": n} for m in range(60)},
                    }
                    for n in range(64)
                }
            }
        ]
        * 3
    },
    "long": {"enum": ["a" * 300_000]},
    "a thousand enums": {"enum": list(range(1001))},
    "a long name": {"properties": {"a" * 257: {}}},
    "half a character": {"properties": {"\ud800": {}}},
    "half a character in an enum": {"enum": ["\ud800"]},
    "many ways": {"type": "string", "pattern": "^" + "a?" * 60 + "$"},
    "nested repetitions": {"type": "string", "pattern": "^(((a{1,50}b?){1,50}c){1,50})$"},
    "repetitions of nothing": {"type": "string", "pattern": "^(a*)*$"},
    "a huge repetition": {"type": "string", "pattern": "^a{60000}$"},
    "a deep pattern": {"type": "string", "pattern": "(" * 90 + "a" + ")" * 90},
    "a long pattern": {"type": "string", "pattern": "a" * 1001},
    "a huge minimum": {"type": "array", "minItems": 10**9},
    "many minima": {
        "properties": {f"p{n}": {"type": "array", "items": {"const": n}, "minItems": 100_000} for n in range(300)}
    },
    "a huge number": {"type": "integer", "minimum": 10**400},
    "a fraction of a count": {"type": "string", "minLength": 0.5},
    "doubling": doubling(30),
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_schema_is_one_line_soon(schema: Any) -> None:
    began = time.process_time()
    if schema is HOSTILE["doubling"]:
        assert len(json_schema_constraint(schema).grammar) < 1000
    else:
        with pytest.raises(YarnEdgeError, match=r"^.{1,600}$") as refused:
            json_schema_constraint(schema)
        assert "\n" not in str(refused.value)
    assert time.process_time() - began < 1.5


def matches(expression: str | None, text: str) -> bool:
    """Whether a text without a sign is one of an expression of digits; by its own regular expression."""
    import re

    pattern = re.sub(r'"([^"]*)"', lambda found: re.escape(found[1]), expression or "(?!)").replace(" ", "")
    return re.fullmatch(pattern, text) is not None


@settings(max_examples=60, deadline=None)
@given(st.integers(-3000, 3000), st.integers(0, 1500))
def test_integers_are_exactly_those_between(low: int, width: int) -> None:
    expression = integers(low, low + width)
    around = {low - 1, low, low + width, low + width + 1, 0, -low, *range(low, low + width, max(width // 9, 1))}
    for value in around:
        assert matches(expression, str(value)) == (low <= value <= low + width), value


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**8), 10**8), st.integers(0, 10**8), st.booleans(), st.booleans())
def test_numbers_are_exactly_those_between(first: int, width: int, open_low: bool, open_high: bool) -> None:
    unit = Fraction(1, 10**PLACES)
    low, high = first * unit, (first + width) * unit
    expression = numbers(low, high, open_low, open_high)
    for n in {first - 1, first, first + 1, first + width // 2, first + width - 1, first + width, first + width + 1}:
        inside = (low < n * unit or (low == n * unit and not open_low)) and (
            n * unit < high or (n * unit == high and not open_high)
        )
        whole, places = divmod(abs(n), 10**PLACES)
        text = ("-" if n < 0 else "") + f"{whole}.{places:0{PLACES}}"
        if n:
            assert matches(expression, text) == inside, text
        if not places and n:
            assert matches(expression, text.partition(".")[0]) == inside, text


@pytest.mark.parametrize("low, high", [(0, 5), (3, 3), (0, 2500), (1500, 1500), (999, 4001), (2, None), (0, 2_000_000)])
def test_repetitions_are_counted_in_blocks(low: int, high: int | None) -> None:
    """By lengths that the expression allows, computed from its notation."""
    rules = GrammarRules()
    item = rules.add('"x"')
    of = Texts(rules.text(rules.repeat(item, low, high)))

    def lengths(item: Any) -> set[tuple[int, float]]:
        if isinstance(item, str):
            return {(1, 1)} if item[0] == '"' else lengths(of.rules[item])
        spans = set()
        for way in item:
            a, b = 0, 0.0
            for inside, least, most in way:
                (x, y), *more = lengths(inside)
                assert not more or most == 1
                if more:
                    x, y = min(x, more[0][0]), max(y, more[0][1])
                a, b = a + x * least, b + (float("inf") if most is None else y * most)
            spans.add((a, b))
        return spans

    found = lengths("root")
    wanted = float("inf") if high is None or high > 1_000_000 else high
    assert min(a for a, _ in found) == low
    assert max(b for _, b in found) == wanted


def test_until_stops_at_the_first_tag() -> None:
    rules = GrammarRules()
    of = Texts(rules.text(rules.until("aab", rules.add(literal("!")))))
    draw = random.Random(0)
    for _ in range(200):
        text = of.one(draw)
        assert text.index("aab!") == len(text) - 4
    states = of.rules

    def accepts(text: str) -> bool:
        state = "r2"
        for character in text:
            if state == "r1":
                return False
            ways = [way for way in states[state] if way[0][0] == f'"{character}"'] or [states[state][-1]]
            state = ways[0][1][0]
        return state == "r1"

    for text in map("".join, itertools.product("abc", repeat=5)):
        assert accepts(text) == (text.find("aab") == 2), text
