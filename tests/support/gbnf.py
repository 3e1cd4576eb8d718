"""Random texts of a grammar in GBNF, as `yarn_edge.engine.grammar` writes them: an own reading of that notation."""

from __future__ import annotations

import random
import re
from typing import Any

_TOKEN = re.compile(r'\s*("(?:\\.|[^"\\])*"|\[\^?(?:\\.|[^\]\\])+\]|\{\d+(?:,\d*)?\}|[()|*+?]|[A-Za-z][\w-]*)')
_ESCAPE = re.compile(r"\\(?:x(..)|u(....)|U(........)|(.))", re.S)
_PLAIN = {"n": "\n", "t": "\t", "r": "\r"}


def _unescaped(text: str) -> str:
    def one(found: re.Match[str]) -> str:
        code = found[1] or found[2] or found[3]
        return chr(int(code, 16)) if code else _PLAIN.get(found[4], found[4])

    return _ESCAPE.sub(one, text)


class Texts:
    """The texts of a grammar. `one` draws one; deep down it takes the alternative that ends soonest, as far as can be seen."""

    def __init__(self, grammar: str) -> None:
        self.rules: dict[str, Any] = {}
        for line in grammar.strip().split("\n"):
            name, body = line.split(" ::= ", 1) if " ::= " in line else (line.removesuffix(" ::="), "")
            tokens = [found[1] for found in _TOKEN.finditer(body)]
            assert "".join("".join(tokens).split()) == "".join(body.split()), line
            self.rules[name] = self._alternatives(tokens)
            assert not tokens, line

    def _alternatives(self, tokens: list[str]) -> list[list[tuple[Any, int, int | None]]]:
        ways: list[list[tuple[Any, int, int | None]]] = [[]]
        while tokens and tokens[0] != ")":
            token = tokens.pop(0)
            if token == "|":
                ways.append([])
                continue
            item: Any = token
            if token == "(":
                item = self._alternatives(tokens)
                tokens.pop(0)
            low, high = 1, 1
            if tokens and tokens[0][0] in "*+?{":
                count = tokens.pop(0)
                if count[0] == "{":
                    first, comma, last = count[1:-1].partition(",")
                    low, high = int(first), (int(last) if last else None) if comma else int(first)
                else:
                    low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[count]
            ways[-1].append((item, low, high))
        return ways

    def one(self, draw: random.Random, depth: int = 0, item: Any = "root") -> str:
        if isinstance(item, str):
            if item[0] == '"':
                return _unescaped(item[1:-1])
            if item[0] == "[":
                return self._character(draw, item[1:-1])
            return self.one(draw, depth + 1, self.rules[item])
        way = item[0] if depth > 60 else draw.choice(item)
        parts = []
        for inside, low, high in way:
            most = low + 3 if high is None else min(high, low + 3)
            n = high if high is not None and draw.random() < 0.05 else draw.randint(low, low if depth > 60 else most)
            parts += [self.one(draw, depth + 1, inside) for _ in range(n or 0)]
        return "".join(parts)

    @staticmethod
    def _character(draw: random.Random, body: str) -> str:
        negated = body[0] == "^"
        units = re.findall(r"\\x..|\\u....|\\U........|\\.|.", body[negated:], re.S)
        ranges, n = [], 0
        while n < len(units):
            low = high = ord(_unescaped(units[n]))
            if n + 2 < len(units) and units[n + 1] == "-":
                high = ord(_unescaped(units[n + 2]))
                n += 2
            ranges.append((low, high))
            n += 1
        if negated:
            return next(
                c for c in iter(lambda: chr(draw.randint(32, 126)), "") if not any(a <= ord(c) <= b for a, b in ranges)
            )
        low, high = draw.choice(ranges)
        return chr(draw.choice([low, high, draw.randint(low, high)]))
