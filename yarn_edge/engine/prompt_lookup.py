"""Drafts of the next tokens, copied from the text itself: where an answer quotes, translates names or edits a document, it has been
said before (Saxena 2023, "prompt lookup decoding").

The model checks a draft in one evaluation, which costs less than as many single ones. What it would not have said is dropped, so
a draft decides how fast an answer comes, not what it says. Where drafts do not pay (measured while they run), none are made for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from yarn_edge.runtime.context import MAX_DRAFT

Lookup = Literal["auto", "on", "off"]

_NGRAM = 3  # tokens that must have been said before, in this order
_PLACES = 16  # where they were: so many of the last are looked at
_LONGEST = 32  # of the tokens before them are compared
_RECENT = 6  # drafts that tell whether drafting pays
_PAUSE, _LONGEST_PAUSE = 32, 512  # tokens without a draft after it did not


class PromptLookup:
    """One text's n-grams, and what drafts cost and gained. limit: tokens of a draft; always: also where they do not pay."""

    def __init__(self, limit: int = MAX_DRAFT, *, always: bool = False) -> None:
        self.limit, self.always = min(limit, MAX_DRAFT), always
        self.drafted = self.accepted = 0
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], deque[int]] = {}
        self._size = 4
        self._plain_s = 0.0  # of one token evaluated alone: a moving average
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # tokens that came of a draft, and what it took
        self._paused, self._pause = 0, _PAUSE

    def read(self, tokens: Sequence[int]) -> None:
        """The text so far, which may be longer than before, or another."""
        known = len(self._tokens)
        if self._tokens != list(tokens[:known]):
            self._tokens, self._places, known = [], {}, 0
        for token in tokens[known:]:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token of the text."""
        self._tokens.append(token)
        end = len(self._tokens)
        if end > _NGRAM:  # the place of the last n-gram is only known when something follows
            key = tuple(self._tokens[end - 1 - _NGRAM : end - 1])
            self._places.setdefault(key, deque(maxlen=_PLACES)).append(end - 1)

    def draft(self, room: int) -> list[int]:
        """What followed where the last tokens stood before, [] if they did not, or if drafts do not pay now.

        room: at most so many tokens.
        """
        if self._paused:
            self._paused -= 1
            return []
        if not self._plain_s:  # to know what a draft must beat
            return []
        places = self._places.get(tuple(self._tokens[-_NGRAM:]))
        if not places:
            return []
        best = max(places, key=lambda place: (self._common_before(place), place))
        return self._tokens[best : best + min(self._size, self.limit, room)]

    def _common_before(self, place: int) -> int:
        """How many tokens before `place` are those before the end."""
        tokens, end = self._tokens, len(self._tokens)
        same = _NGRAM
        while same < min(_LONGEST, place) and tokens[place - 1 - same] == tokens[end - 1 - same]:
            same += 1
        return same

    def took(self, seconds: float) -> None:
        """What a token took that was evaluated alone."""
        self._plain_s = seconds if not self._plain_s else 0.9 * self._plain_s + 0.1 * seconds

    def judged(self, drafted: int, accepted: int, seconds: float) -> None:
        """What became of a draft, and what its evaluation took."""
        self.drafted += drafted
        self.accepted += accepted
        self._size = min(self.limit, 2 * self._size) if accepted == drafted else max(2, accepted + 1)
        self._spent(accepted + 1, seconds)

    def _spent(self, n_tokens: int, seconds: float) -> None:
        self._recent.append((n_tokens, seconds))
        if self.always or len(self._recent) < _RECENT:
            return
        tokens, spent = (sum(values) for values in zip(*self._recent, strict=True))
        if tokens * self._plain_s >= spent:
            self._pause = _PAUSE
            return
        self._paused, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        self._recent.clear()
