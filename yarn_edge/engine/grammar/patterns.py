"""Regular expressions (`pattern`) and formats of JSON strings as grammars, with the escapes that JSON asks for.

Python's own parser reads the expression; classes such as `\\d` and `\\W` stand for ASCII characters only, where the dialects differ.
Not anchored, an expression is looked for anywhere in the string, as JSON Schema says.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from yarn_edge.engine.grammar.ambiguity import MOST_WAYS, PatternPlaces
from yarn_edge.engine.grammar.rules import EVERY, GrammarRules, Ranges, chars, literal, without

if sys.version_info >= (3, 11):
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_parse

MAX_PATTERN_CHARS = 1000
MAX_STATES = 2000  # ways to be inside a pattern at once: nested repetitions multiply
_MAX_REPEAT = 1000
# Raw in a JSON string, and what is escaped.
RAW = without(EVERY, [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F)])
_ESCAPED = {0x22: '\\"', 0x5C: "\\\\", 0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r", 0x08: "\\b", 0x0C: "\\f"}
_ASCII: Ranges = ((0, 0x7F),)
_CLASSES: dict[str, Ranges] = {
    "DIGIT": ((0x30, 0x39),),
    "SPACE": ((0x09, 0x0D), (0x20, 0x20)),
    "WORD": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
}
_LINE = without(EVERY, [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)])  # what . stands for

_DATE = r"(19|20)\d{2}-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])"  # every month has 28 days
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(\d|[1-9]\d|1\d\d|2[0-4]\d|25[0-5])"
_LABEL = "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
# Formats whose texts these patterns cover in part: enough to write one.
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "duration": r"^P(\d{1,4}[DW]|T\d{1,4}[HMS]|\d{1,4}DT\d{1,4}[HMS])$",
    "uuid": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "ipv4": rf"^{_BYTE}\.{_BYTE}\.{_BYTE}\.{_BYTE}$",
    "ipv6": "^([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}$",
    "hostname": rf"^({_LABEL}\.){{0,4}}{_LABEL}$",
    "email": rf"^[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+){{0,3}}@({_LABEL}\.){{1,4}}[a-z]{{2,10}}$",
    "uri": rf"^https?://({_LABEL}\.){{0,4}}{_LABEL}(:[1-9]\d{{0,3}})?(/[A-Za-z0-9._~-]{{0,100}}){{0,8}}(\?[A-Za-z0-9._~=&-]{{1,200}})?$",
}


class PatternError(ValueError):
    """A regular expression that no grammar is made of; the reason, without the place."""


class StringPattern:
    """A parsed expression. shortest, longest: characters of the strings; longest is None if there is no limit."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise PatternError(f"has {len(pattern)} characters, at most {MAX_PATTERN_CHARS} are possible")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                parsed = sre_parse.parse(pattern)
        except (Warning, ValueError, OverflowError, RecursionError, sre_parse.error) as error:
            raise PatternError(f"is not a regular expression that can be read: {error}") from error
        if parsed.state.flags & ~32:  # 32: re.UNICODE, which is always on
            raise PatternError("has flags, which are not supported")
        outer = _Way(list(parsed))
        branches = (
            outer.items[0][1][1] if len(outer.items) == 1 and str(outer.items[0][0]) == "BRANCH" else [outer.items]
        )
        self._ways = [_Way(list(branch), outer.at_start, outer.at_end) for branch in branches]
        low, high = parsed.getwidth()
        self.shortest = int(low)
        is_whole = all(way.at_start and way.at_end for way in self._ways)
        self.longest = int(high) if is_whole and high < _MAX_REPEAT**2 else None

    def expression(self, rules: GrammarRules) -> str:
        """The inside of a JSON string that matches. Raises PatternError for what a grammar cannot say."""
        around, ways, states = f"{json_char(rules)}*", [], 0
        for way in self._ways:
            text, more = _sequence(way.items, rules, 0)
            states += more
            ways.append(" ".join(([] if way.at_start else [around]) + [f"({text})"] + ([] if way.at_end else [around])))
        if states > MAX_STATES:
            raise PatternError(f"has nested repetitions of {states} states, at most {MAX_STATES} are possible")
        most_ways = self._most_ways()
        if most_ways > MOST_WAYS:
            raise PatternError(f"lets a character be read in over {MOST_WAYS} ways")
        rules.ways = max(rules.ways, most_ways)
        return f"({' | '.join(ways)})"

    def _most_ways(self) -> int:
        """In how many ways the next character can be read."""
        places = PatternPlaces(_set)
        parts = (
            places.sequence(
                [places.any_text(not way.at_start), places.items(way.items), places.any_text(not way.at_end)]
            )
            for way in self._ways
        )
        return places.ways(places.either(parts)[1])


class _Way:
    """One of the alternatives of an expression, without its anchors."""

    def __init__(self, items: list[Any], at_start: bool = False, at_end: bool = False) -> None:
        begins, ends = bool(items) and _is(items[0], "AT_BEGINNING"), bool(items) and _is(items[-1], "AT_END")
        self.items = items[begins : len(items) - ends] if len(items) > 1 else [] if begins or ends else items
        self.at_start, self.at_end = at_start or begins, at_end or ends


def json_char(rules: GrammarRules) -> str:
    """One character of a JSON string, or its escape; never half of a surrogate pair."""
    hexadecimal = "[0-9a-fA-F]"
    whole = f"[0-9a-cefA-CEF] {hexadecimal}{{3}} | [dD] [0-7] {hexadecimal}{{2}}"
    return rules.add(f'{chars(RAW)} | "\\\\" (["\\\\/bfnrt] | "u" ({whole}))')


def _one(ranges: Ranges) -> str:
    raw = tuple((max(a, x), min(b, y)) for a, b in ranges for x, y in RAW if max(a, x) <= min(b, y))
    ways = [chars(raw)] if raw else []
    ways += [literal(escape) for code, escape in _ESCAPED.items() if any(a <= code <= b for a, b in ranges)]
    if not ways:
        raise PatternError("asks for a character that is not supported")
    return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"


def _is(item: tuple[Any, Any], anchor: str) -> bool:
    return str(item[0]) == "AT" and str(item[1]) == anchor


def _sequence(items: Any, rules: GrammarRules, depth: int) -> tuple[str, int]:
    if depth > 20:
        raise PatternError("is nested more than 20 levels deep")
    parts = [_item(str(operation), argument, rules, depth) for operation, argument in items]
    return " ".join(text for text, _states in parts) or '""', sum(states for _text, states in parts)


def _item(operation: str, argument: Any, rules: GrammarRules, depth: int) -> tuple[str, int]:
    """(an expression, the number of places in it)."""
    if operation in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        return _one(_set(operation, argument)), 1
    if operation == "SUBPATTERN":
        _group, on, off, inside = argument
        if on or off:
            raise PatternError("has flags, which are not supported")
        text, states = _sequence(inside, rules, depth + 1)
        return f"({text})", states
    if operation == "BRANCH":
        ways = [_sequence(way, rules, depth + 1) for way in argument[1]]
        return f"({' | '.join(text for text, _ in ways)})", sum(states for _, states in ways)
    if operation in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, inside = argument
        limit = None if high == sre_parse.MAXREPEAT else int(high)
        if max(low, limit or 0) > _MAX_REPEAT:
            raise PatternError(f"repeats {max(low, limit or 0)} times, at most {_MAX_REPEAT} are possible")
        if limit != 1 and inside.getwidth()[0] == 0:
            raise PatternError("repeats what may be empty")
        text, states = _sequence(inside, rules, depth + 1)
        return rules.repeat(rules.add(text), low, limit), states * max(low + 1 if limit is None else limit, 1)
    raise PatternError(f"uses {operation.lower()}, which a grammar cannot say")


def _set(operation: str, argument: Any) -> Ranges:
    if operation == "ANY":
        return _LINE
    if operation != "IN":
        one: Ranges = ((argument, argument),)
        return one if operation == "LITERAL" else without(EVERY, one)
    negated, chosen = False, []
    for kind, value in argument:
        match str(kind):
            case "NEGATE":
                negated = True
            case "LITERAL":
                chosen.append((value, value))
            case "RANGE":
                chosen.append(value)
            case "CATEGORY":
                name = str(value).removeprefix("CATEGORY_")
                of = _CLASSES[name.removeprefix("NOT_")]
                if name.startswith("NOT_"):
                    of = without(EVERY if negated else _ASCII, of)
                chosen += of
            case other:
                raise PatternError(f"uses {other.lower()}, which a grammar cannot say")
    if negated and any(str(kind) == "CATEGORY" for kind, _value in argument):
        chosen.append((0x80, 0x10FFFF))
    return without(EVERY, chosen) if negated else tuple(chosen)
