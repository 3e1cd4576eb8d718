"""The tokens whose keys and values are known to be in a context's cache, and how many of them are canonical.

Prompts are evaluated in batches that begin at multiples of n_batch. The tokens up to the last whole batch are "canonical":
whether evaluated now or read from disk, their keys and values are the same to the bit. Other ways of batching round a quantized
model differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from yarn_edge.runtime.context import Context
from yarn_edge.runtime.recurrent import EarlierStates


class CachedTokens:
    """tokens: those in the cache, from position 0 on; canonical: how many leading tokens are canonical."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.tokens: list[int] = []
        self.canonical = 0
        self.earlier = EarlierStates(context)

    def __len__(self) -> int:
        return len(self.tokens)

    def common(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of the prompt the cache can be cut to, not counting the last one, whose logits must be evaluated."""
        same = 0
        for mine, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if mine != theirs:
                break
            same += 1
        return self.reachable(same)

    def reachable(self, n_tokens: int) -> int:
        """The largest number of tokens, up to `n_tokens`, that the cache can be cut to."""
        return self.earlier.reachable(n_tokens, len(self.tokens))

    def cut(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` tokens, and drop whatever an interrupted evaluation left after them.

        It may have changed the state of recurrent layers, so that fewer tokens are left.
        """
        kept = self.earlier.cut(n_tokens)
        del self.tokens[kept:]
        self.canonical = min(self.canonical, kept)

    def forget(self) -> None:
        """Assume nothing about the cache."""
        self.tokens, self.canonical = [], 0
        self.earlier.forget()

    def restored(self, tokens: Sequence[int]) -> None:
        """Note that the cache holds these tokens, and that they are canonical."""
        self.tokens, self.canonical = list(tokens), len(tokens)
        self.earlier.take(len(tokens))

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
        if 0 < len(tokens) - len(self.tokens) <= n_batch:  # a later prompt may differ in its last tokens
            self.earlier.take(len(self.tokens))
        return len(part)

    def keep_of_draft(self, batch: Sequence[int], n_tokens: int) -> None:
        """Keep the first `n_tokens` of `batch`, which the context has just evaluated after the cached tokens."""
        self.tokens += batch[:n_tokens]
        self.context.keep(len(self.tokens))
