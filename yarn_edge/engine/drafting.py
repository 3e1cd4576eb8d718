"""Drafts for the one answer that is generated, and their cost. While several are generated, there are none."""

from __future__ import annotations

from yarn_edge.engine.answer import RunningAnswer
from yarn_edge.engine.prompt_lookup import PromptLookup


class Drafting:
    """What the lookup has read of which answer."""

    def __init__(self, lookup: PromptLookup | None) -> None:
        self.lookup = lookup
        self._of: RunningAnswer | None = None
        self._read = 0

    def _for(self, answer: RunningAnswer) -> PromptLookup | None:
        # A batch rounds differently from single evaluations, and could make another token the most probable.
        greedy = answer.request.sampling.temperature == 0
        return None if self.lookup is None or (greedy and not self.lookup.always) else self.lookup

    def draft(self, answer: RunningAnswer, room: int) -> list[int]:
        """Tokens that may follow, at most `room`."""
        lookup = self._for(answer)
        if lookup is None:
            return []
        if self._of is not answer:
            lookup.read(answer.tokens[:-1])
            self._of, self._read = answer, len(answer.tokens) - 1
        for token in answer.tokens[self._read :]:
            lookup.add(token)
        self._read = len(answer.tokens)
        return lookup.draft(room) if room > 0 else []

    def took(self, answer: RunningAnswer, seconds: float) -> None:
        """Record the time of a step with one token of one answer."""
        lookup = self._for(answer)
        if lookup is not None and self._of is answer:
            lookup.took(seconds)

    def judged(self, answer: RunningAnswer, drafted: int, accepted: int, seconds: float) -> None:
        """Record how many tokens of a draft were accepted, and the time of its evaluation."""
        assert self.lookup is not None
        self.lookup.judged(drafted, accepted, seconds)
        answer.drafted += drafted
        answer.accepted += accepted
