"""The tokens whose keys and values are surely in a context's cache, and how each of them came there.

Prompts are evaluated in batches that begin at multiples of n_batch. Their first tokens up to the last whole batch are "canonical":
evaluated at any time, or read from the disk, they are the same to the bit (how tokens are batched changes the rounding of a
quantized model). A draft's batch rounds otherwise than the single evaluations would that it stands for; from the first such token on
the cache can be made what it is without drafts (`undrafted`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from yarn_edge.runtime.context import Context


class CachedTokens:
    """tokens: in the cache, from position 0 on; canonical: how many of the first are so; drafted_at: the first of a draft's batch."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.tokens: list[int] = []
        self.canonical = 0
        self.drafted_at: int | None = None
        self._steps: list[int] = []  # where each evaluation began, had there been no drafts

    def __len__(self) -> int:
        return len(self.tokens)

    def common(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of the prompt the cache holds; the last one is always evaluated, for its logits."""
        same = 0
        for mine, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if mine != theirs:
                break
            same += 1
        return same

    def cut(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` tokens, and nothing that an interrupted evaluation left behind them."""
        del self.tokens[n_tokens:]
        while self._steps and self._steps[-1] >= n_tokens:
            self._steps.pop()
        if self.drafted_at is not None and self.drafted_at >= n_tokens:
            self.drafted_at = None
        self.context.keep(n_tokens)

    def forget(self) -> None:
        """Know nothing of the cache."""
        self.tokens, self.canonical, self._steps, self.drafted_at = [], 0, [], None

    def restored(self, tokens: Sequence[int]) -> None:
        """The cache holds these, and they are canonical."""
        self.tokens, self.canonical, self.drafted_at = list(tokens), len(tokens), None
        self._steps = list(range(0, len(tokens), self.context.n_batch))

    def evaluate(self, tokens: Sequence[int], outputs: Literal["last", "none"] = "last") -> None:
        """Evaluate what follows in the cache, as it would be without drafts."""
        at = len(self.tokens)
        self.context.evaluate(tokens, at, outputs)
        self._steps.append(at)
        self.tokens.extend(tokens)

    def evaluate_prompt(self, tokens: Sequence[int]) -> int:
        """Evaluate the next batch of a prompt, of which the cache holds the beginning. Returns how many tokens that were."""
        at, n_batch = len(self.tokens), self.context.n_batch
        part = tokens[at : (at // n_batch + 1) * n_batch]
        self.evaluate(part, "last" if at + len(part) == len(tokens) else "none")
        if self.canonical == at and len(part) == n_batch:
            self.canonical += n_batch
        return len(part)

    def keep_of_draft(self, batch: Sequence[int], n_tokens: int) -> None:
        """The context evaluated `batch` behind the cache at once; the first `n_tokens` of it stay."""
        at = len(self.tokens)
        if n_tokens and self.drafted_at is None:
            self.drafted_at = at
        self._steps += range(at, at + n_tokens)
        self.tokens += batch[:n_tokens]
        self.context.keep(at + n_tokens)

    def undrafted(self) -> list[Sequence[int]]:
        """Cut the cache before the first draft. Returns the evaluations that bring it back as it would be without any."""
        first, tokens, ends = self.drafted_at, self.tokens[:], [*self._steps[1:], len(self.tokens)]
        if first is None:
            return []
        parts = [(a, b) for a, b in zip(self._steps, ends, strict=True) if b > first]
        self.cut(parts[0][0])
        return [tokens[a:b] for a, b in parts]
