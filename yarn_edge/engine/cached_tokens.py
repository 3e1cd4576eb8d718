"""The tokens whose keys and values are known to be in a sequence of a context's cache, and how many of them are canonical.

The keys and values of canonical tokens are the same to the bit whenever they are evaluated, now or read from disk. With one sequence,
prompts are evaluated in batches that begin at multiples of n_batch, and the tokens up to the last whole batch are canonical; other
ways of batching round a quantized model differently. With several, prompts are read in slices of any size beside other answers: what
was read as a prompt is canonical (`yarn_edge.engine.repeatable` says where that is to the bit), what was generated is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from yarn_edge.runtime.batch import BatchPart
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.recurrent import EarlierStates


class CachedTokens:
    """tokens: those in the cache, from position 0 on; canonical: how many leading tokens are canonical.

    busy: whether an answer uses the sequence now; key: whose request it was last; used_at: when, a count; kept: how many tokens
    are known to be on disk.
    """

    def __init__(self, context: Context, sequence: int = 0) -> None:
        self.context, self.sequence = context, sequence
        self.tokens: list[int] = []
        self.canonical = self.used_at = self.kept = 0
        self.busy = False
        self.key = ""
        self.unit = 1 if context.settings.unified else context.n_batch
        self.earlier = EarlierStates(context, sequence)

    def __len__(self) -> int:
        return len(self.tokens)

    def common(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of the prompt the cache can be cut to, not counting the last one, whose logits must be evaluated."""
        return self.reachable(same_beginning(self.tokens, prompt, len(prompt) - 1))

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

    def slice_of(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """The tokens that are to be evaluated next of a prompt whose beginning is in the cache, at most `most`."""
        at = len(self.tokens)
        end = at + most if self.unit == 1 else (at // self.unit + 1) * self.unit
        return tokens[at:end]

    def evaluated(self, part: BatchPart, prompt: Sequence[int]) -> None:
        """Note that a part of a prompt was evaluated, or of an answer."""
        at = part.start
        self.tokens.extend(part.tokens)
        if part.generated:
            return
        if self.canonical == at and len(part.tokens) % self.unit == 0:
            self.canonical += len(part.tokens)
        if 0 < len(prompt) - len(self.tokens) <= self.context.n_batch:  # a later prompt may differ in its last tokens
            self.earlier.take(len(self.tokens))


def same_beginning(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many leading tokens two texts have in common, of the first `most`."""
    same, most = 0, min(len(one), len(other), most)
    while same < most:  # by blocks: texts are long, and usually the same or soon different
        end = min(same + 256, most)
        if one[same:end] != other[same:end]:
            return next(i for i in range(same, end) if one[i] != other[i])
        same = end
    return same
