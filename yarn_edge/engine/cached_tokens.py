"""The tokens whose keys and values are surely in a context's cache, and how each of them came there.

Prompts are evaluated in batches that begin at multiples of n_batch. Their first tokens up to the last whole batch are "canonical":
evaluated at any time, or read from the disk, they are the same to the bit (how tokens are batched changes the rounding of a
quantized model).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from yarn_edge.runtime.context import Context


class CachedTokens:
    """tokens: in the cache, from position 0 on; canonical: how many of the first are so."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.tokens: list[int] = []
        self.canonical = 0

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
        self.context.keep(n_tokens)

    def forget(self) -> None:
        """Know nothing of the cache."""
        self.tokens, self.canonical = [], 0

    def restored(self, tokens: Sequence[int]) -> None:
        """The cache holds these, and they are canonical."""
        self.tokens, self.canonical = list(tokens), len(tokens)

    def evaluate(self, tokens: Sequence[int], outputs: Literal["last", "none"] = "last") -> None:
        """Evaluate the tokens that follow those in the cache."""
        self.context.evaluate(tokens, len(self.tokens), outputs)
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
        self.tokens += batch[:n_tokens]
        self.context.keep(len(self.tokens))
