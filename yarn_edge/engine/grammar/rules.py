"""The rules of a grammar while they are written: literals, sets of characters, repetitions, within limits.

llama.cpp copies a repeated item for each repetition, at most 2000 times, and takes a larger upper limit for none: `GrammarRules.repeat`
counts in blocks beyond that. All characters but letters and digits are written as escapes, so that a grammar is ASCII.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from yarn_edge.errors import YarnEdgeError

MAX_ELEMENTS = 100_000  # of llama.cpp's rules, after its copies
MAX_COUNT = 1_000_000  # a higher limit counts as none: no answer is that long
_BLOCK = 1000
_LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)

Ranges = tuple[tuple[int, int], ...]  # code points, both ends included


class GrammarLimitError(YarnEdgeError):
    """A grammar would be too large for llama.cpp."""


class GrammarRules:
    """Named rules. `add` and the methods that repeat return an expression that can stand anywhere in another rule.

    ways: in how many ways the next character can be read somewhere.
    """

    def __init__(self, prefix: str = "r") -> None:
        self._prefix, self.ways = prefix, 1
        self._names: dict[str, str] = {}  # by what they are
        self._reserved = 0
        self._bodies: dict[str, str] = {}
        self._elements = 0

    def add(self, body: str) -> str:
        """The name of a rule; of the same one if it is there."""
        if body not in self._names:
            name = self.reserve()
            self.define(name, body)
            self._names[body] = name
        return self._names[body]

    def reserve(self) -> str:
        """A name for a rule that is defined later: for recursion."""
        self._reserved += 1
        return f"{self._prefix}{self._reserved}"

    def define(self, name: str, body: str) -> None:
        """The rule of a reserved name."""
        self._bodies[name] = body
        self._spend(1 + len(body))

    def repeat(self, item: str, low: int, high: int | None) -> str:
        """`item`, a rule's name or a set of characters, from `low` to `high` times; None: any number."""
        if high is not None and high > MAX_COUNT:
            high = None
        if low > MAX_COUNT:
            raise GrammarLimitError(f"asks for {low} of something, at most {MAX_COUNT} are possible")
        if high is None:
            return self._exactly(item, low) + (f" {item}*" if low else f"{item}*")
        optional = high - low
        if low <= _BLOCK and optional <= _BLOCK:
            self._spend(high)
            return f"{item}{{{low},{high}}}"
        blocks, rest = divmod(optional, _BLOCK)
        block = self.add(f"{item}{{{_BLOCK}}}")
        self._spend(3 * _BLOCK + 2 * blocks)
        some = f"{block}{{0,{blocks - 1}}} {item}{{0,{_BLOCK - 1}}} | {block}{{{blocks}}} {item}{{0,{rest}}}"
        return f"{self._exactly(item, low)} {self.add(some) if blocks else self.repeat(item, 0, rest)}"

    def _exactly(self, item: str, count: int) -> str:
        blocks, rest = divmod(count, _BLOCK)
        parts = [f"{self.add(f'{item}{{{_BLOCK}}}')}{{{blocks}}}"] if blocks else []
        self._spend(blocks + rest)
        return " ".join([*parts, f"{item}{{{rest}}}"] if rest else parts)

    def _spend(self, elements: int) -> None:
        self._elements += elements
        if self._elements > MAX_ELEMENTS:
            raise GrammarLimitError(f"makes a grammar of more than {MAX_ELEMENTS} elements: simplify it")

    def but_none_of(self, texts: Iterable[str], char: Ranges, end: str) -> str:
        """Any text of the characters `char` that is none of `texts`, followed by `end`. `texts` may have other characters, too."""
        tree: dict[str, dict] = {}  # type: ignore[type-arg]
        for text in texts:
            at = tree
            for character in text:
                at = at.setdefault(character, {})
            at[""] = {}
        return self._not_in(tree, char, end)

    def _not_in(self, tree: dict[str, dict], char: Ranges, end: str) -> str:  # type: ignore[type-arg]
        following = [c for c in tree if c and any(a <= ord(c) <= b for a, b in char)]
        others = without(char, tuple((ord(c), ord(c)) for c in following))
        ways = [f"{chars(others)} {chars(char)}* {end}"] if others else []
        for character in following:
            ways.append(f"{literal(character)} {self._not_in(tree[character], char, end)}")
        if "" not in tree:
            ways.append(end)
        return self.add(" | ".join(ways)) if ways else self.add(f"{chars(others)} {end}")

    def until(self, tag: str, then: str) -> str:
        """Any text up to the first `tag`, then the rule `then`."""
        states = [self.reserve() for _ in tag]
        for n, state in enumerate(states):
            ways = []
            for character in dict.fromkeys((tag[n], *sorted(set(tag)))):
                matched = _longest_prefix(tag, tag[:n] + character)
                ways.append(f"{literal(character)} {then if matched == len(tag) else states[matched]}")
            ways.append(f"[^{''.join(map(_escaped, sorted(set(tag))))}] {states[0]}")
            self.define(state, " | ".join(ways))
        return states[0]

    def text(self, root: str) -> str:
        """The grammar, whose root is the expression `root`."""
        return "\n".join([f"root ::= {root}", *(f"{name} ::= {body}" for name, body in self._bodies.items())]) + "\n"


def _longest_prefix(tag: str, text: str) -> int:
    return next(n for n in range(min(len(tag), len(text)), -1, -1) if text.endswith(tag[:n]))


def literal(text: str) -> str:
    """An expression that stands for exactly this text."""
    return '"' + "".join(map(_escaped, text)) + '"'


def chars(ranges: Ranges) -> str:
    """An expression for one character of a set that is not empty."""
    return "[" + "".join(_escaped(chr(a)) + (f"-{_escaped(chr(b))}" if b > a else "") for a, b in ranges) + "]"


def without(ranges: Ranges, removed: Sequence[tuple[int, int]]) -> Ranges:
    """The set without another."""
    left = list(ranges)
    for low, high in removed:
        left = [part for a, b in left for part in ((a, min(b, low - 1)), (max(a, high + 1), b)) if part[0] <= part[1]]
    return tuple(dict.fromkeys(left))


EVERY: Ranges = without(((0, _LAST),), [SURROGATES])


def _escaped(character: str) -> str:
    code = ord(character)
    if character.isascii() and character.isalnum():
        return character
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
