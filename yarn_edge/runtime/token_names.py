"""Names of tokens that a tokenizer recognizes in a text, such as `<|im_end|>`, found in time that the number of names does not set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator


class TokenNames:
    """A set of names. Empty ones are left out."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(name for name in names if name)
        lengths: dict[str, set[int]] = {}
        for name in self.names:
            lengths.setdefault(name[0], set()).add(len(name))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._openings = _any_of(self._lengths)

    def __bool__(self) -> bool:
        return bool(self.names)

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """(place, name) of every occurrence from left to right; of names that begin at one place, the longest."""
        if self._openings is None:
            return
        end = 0
        for opening in self._openings.finditer(text):
            at = opening.start()
            if at >= end and (name := self._at(text, at)):
                end = at + len(name)
                yield at, name

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in parts, each with whether it is one of the names. No part is empty."""
        end = 0
        for at, name in self.find(text):
            if at > end:
                yield text[end:at], False
            yield name, True
            end = at + len(name)
        if end < len(text):
            yield text[end:], False

    def apart(self) -> TokenNames:
        """The names that no other name can overlap, so that each occurrence is one whatever is around it."""
        inside = {character for name in self.names for character in name[1:]}
        openings = {first for first in self._lengths if first not in inside}
        return TokenNames(n for n in self.names if n[0] in openings and self._lengths.keys().isdisjoint(n[1:]))

    def _at(self, text: str, at: int) -> str | None:
        for length in self._lengths[text[at]]:
            if (name := text[at : at + length]) in self.names:
                return name
        return None


def _any_of(characters: Iterable[str]) -> re.Pattern[str] | None:
    listed = "".join(map(re.escape, sorted(characters)))
    return re.compile(f"[{listed}]") if listed else None
