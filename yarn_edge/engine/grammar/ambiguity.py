"""In how many ways the next character of a text can be read: llama.cpp follows each of them through every character of a token.

A token of n characters can take it that number to the n-th power of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from yarn_edge.engine.grammar.rules import EVERY, Ranges

Places = frozenset[int]
RangesOf = Callable[[str, Any], Ranges]
MOST_WAYS = 50  # more are too slow with the shortest tokens already


class PatternPlaces:
    """The places of a parsed regular expression that read a character, and which can follow which (Glushkov's automaton).

    Repetitions count as loops. ranges_of: the characters of an operation of Python's parser.
    """

    def __init__(self, ranges_of: RangesOf) -> None:
        self._ranges_of = ranges_of
        self._ranges: list[Ranges] = []
        self._after: list[set[int]] = []

    def any_text(self, around: bool) -> Any:
        """What may stand before or after an expression that is looked for anywhere."""
        if not around:
            return True, frozenset(), frozenset()
        place = self._place(EVERY)
        self._follow(place, place)
        return True, place, place

    def sequence(self, parts: Iterable[tuple[bool, Places, Places]]) -> tuple[bool, Places, Places]:
        """(whether it can be empty, where it can begin, where it can end) of parts one after another."""
        empty, first, last = True, frozenset[int](), frozenset[int]()
        for part_empty, part_first, part_last in parts:
            self._follow(last, part_first)
            first = first | part_first if empty else first
            last = last | part_last if part_empty else part_last
            empty = empty and part_empty
        return empty, first, last

    def either(self, ways: Iterable[tuple[bool, Places, Places]]) -> tuple[bool, Places, Places]:
        """The same of alternatives."""
        known = list(ways)
        return (
            any(empty for empty, _, _ in known),
            frozenset().union(*(first for _, first, _ in known)),
            frozenset().union(*(last for _, _, last in known)),
        )

    def items(self, items: Iterable[tuple[Any, Any]]) -> tuple[bool, Places, Places]:
        """The same of a part of the expression that `expression` has read without an error."""
        return self.sequence(self._item(str(operation), argument) for operation, argument in items)

    def _item(self, operation: str, argument: Any) -> tuple[bool, Places, Places]:
        if operation == "SUBPATTERN":
            return self.items(argument[3])
        if operation == "BRANCH":
            return self.either(self.items(way) for way in argument[1])
        if operation in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inside = argument
            empty, first, last = self.items(inside)
            if high != 1:
                self._follow(last, first)
            return empty or not low, first, last
        place = self._place(self._ranges_of(operation, argument))
        return False, place, place

    def _place(self, ranges: Ranges) -> Places:
        self._ranges.append(ranges)
        self._after.append(set())
        return frozenset({len(self._ranges) - 1})

    def _follow(self, before: Places, after: Places) -> None:
        for place in before:
            self._after[place] |= after

    def ways(self, first: Places) -> int:
        """The largest number of places that can read the same next character, at most `MOST_WAYS` + 1."""
        most = 1
        for places in {first, *map(frozenset, self._after)}:
            if len(places) > most:
                most = max(most, self._overlap(places))
            if most > MOST_WAYS:
                return MOST_WAYS + 1
        return most

    def _overlap(self, places: Places) -> int:
        edges = sorted(
            edge for place in places for low, high in self._ranges[place] for edge in ((low, 1), (high + 1, -1))
        )
        most = now = 0
        for _at, change in edges:  # at the same place, ends come first
            now += change
            most = max(most, now)
        return most
