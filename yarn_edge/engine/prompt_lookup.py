"""Drafts of the next tokens, copied from the text so far, which helps if an answer quotes or edits a document (Saxena 2023, "prompt
lookup decoding").

The model checks a draft in one evaluation, which costs less than evaluating its tokens one by one, and drops the tokens that it
would not have chosen. So drafts change how fast an answer comes and, but for the rounding of batches, not what it says. If drafts
do not pay, which is measured while they run, none are made for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from yarn_edge.runtime.context import MAX_DRAFT

Lookup = Literal["auto", "on", "off"]

_NGRAM = 3  # tokens that must occur earlier, in this order
_PLACES = 16  # number of latest occurrences that are considered
_LONGEST = 32  # maximum number of preceding tokens that are compared
_RECENT = 6  # drafts that decide whether drafting pays
_PAUSE, _LONGEST_PAUSE = 32, 512  # tokens without drafts if it does not


class PromptLookup:
    """The n-grams of one text, and the costs and gains of drafts. limit: tokens of a draft; always: draft even if it does not pay."""

    def __init__(self, limit: int = MAX_DRAFT, *, always: bool = False) -> None:
        self.limit, self.always = min(limit, MAX_DRAFT), always
        self.drafted = self.accepted = 0
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], deque[int]] = {}
        self._size = 4
        self._plain_s = 0.0  # seconds of one token evaluated alone, a moving average
        self._recent: deque[tuple[int, float]] = deque(
            maxlen=_RECENT
        )  # tokens that a draft gave, and the seconds it took
        self._paused, self._pause = 0, _PAUSE

    def read(self, tokens: Sequence[int]) -> None:
        """Take in the text so far, which may be a longer version of the last one or a different one."""
        known = len(self._tokens)
        if self._tokens != list(tokens[:known]):
            self._tokens, self._places, known = [], {}, 0
        for token in tokens[known:]:
            self.add(token)

    def add(self, token: int) -> None:
        """Append one token to the text."""
        self._tokens.append(token)
        end = len(self._tokens)
        if end > _NGRAM:  # an n-gram counts once something follows it
            key = tuple(self._tokens[end - 1 - _NGRAM : end - 1])
            self._places.setdefault(key, deque(maxlen=_PLACES)).append(end - 1)

    def draft(self, room: int) -> list[int]:
        """The tokens that followed an earlier occurrence of the last tokens; [] if there is none, or if drafts do not pay now.

        room: maximum number of tokens.
        """
        if self._paused:
            self._paused -= 1
            return []
        if not self._plain_s:  # unknown what a draft must beat
            return []
        places = self._places.get(tuple(self._tokens[-_NGRAM:]))
        if not places:
            return []
        best = max(places, key=lambda place: (self._common_before(place), place))
        return self._tokens[best : best + min(self._size, self.limit, room)]

    def _common_before(self, place: int) -> int:
        """How many tokens before `place` match those before the end."""
        tokens, end = self._tokens, len(self._tokens)
        same = _NGRAM
        while same < min(_LONGEST, place) and tokens[place - 1 - same] == tokens[end - 1 - same]:
            same += 1
        return same

    def took(self, seconds: float) -> None:
        """Record the time of a token that was evaluated alone."""
        self._plain_s = seconds if not self._plain_s else 0.9 * self._plain_s + 0.1 * seconds

    def judged(self, drafted: int, accepted: int, seconds: float) -> None:
        """Record how many tokens of a draft were accepted, and the time of its evaluation."""
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
