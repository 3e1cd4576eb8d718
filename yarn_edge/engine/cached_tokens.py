"""The tokens whose keys and values are known to be in a context's cache, and how many of them are canonical.

Prompts are evaluated in batches that begin at multiples of n_batch. The tokens up to the last whole batch are "canonical":
whether evaluated now or read from disk, their keys and values are the same to the bit. Other ways of batching round a quantized
model differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from yarn_edge.runtime.context import Context


class CachedTokens:
    """tokens: those in the cache, from position 0 on; canonical: how many leading tokens are canonical."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.tokens: list[int] = []
        self.canonical = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def common(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of the prompt the cache holds, not counting the last one, whose logits must be evaluated."""
        same = 0
        for mine, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if mine != theirs:
                break
            same += 1
        return same

    def cut(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` tokens, and drop whatever an interrupted evaluation left after them."""
        del self.tokens[n_tokens:]
        self.context.keep(n_tokens)

    def forget(self) -> None:
        """Assume nothing about the cache."""
        self.tokens, self.canonical = [], 0

    def restored(self, tokens: Sequence[int]) -> None:
        """Note that the cache holds these tokens, and that they are canonical."""
        self.tokens, self.canonical = list(tokens), len(tokens)

    def evaluate(self, tokens: Sequence[int], outputs: Literal["last", "none"] = "last") -> None:
        """Evaluate the tokens that come after those in the cache."""
        self.context.evaluate(tokens, len(self.tokens), outputs)
        self.tokens.extend(tokens)

    def evaluate_prompt(self, tokens: Sequence[int]) -> int:
        """Evaluate the next batch of a prompt whose beginning is in the cache. Returns the number of tokens evaluated."""
        at, n_batch = len(self.tokens), self.context.n_batch
        part = tokens[at : (at // n_batch + 1) * n_batch]
        self.evaluate(part, "last" if at + len(part) == len(tokens) else "none")
        if self.canonical == at and len(part) == n_batch:
            self.canonical += n_batch
        return len(part)

    def keep_of_draft(self, batch: Sequence[int], n_tokens: int) -> None:
        """Keep the first `n_tokens` of `batch`, which the context has just evaluated after the cached tokens."""
        self.tokens += batch[:n_tokens]
        self.context.keep(len(self.tokens))
