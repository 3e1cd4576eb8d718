"""The protocols: which tokens of a document are evaluated together, and which of them are scored.

curve       each piece of a document once, every token scored; by causality one pass gives the whole curve over lengths
llama.cpp   chunks of ctx tokens, the second half of each scored (llama.cpp, tools/perplexity/perplexity.cpp)
sliding     windows of ctx tokens that advance by a stride; each token scored once, with as much context as fits (paper 4.3.1)
truncated   documents cut to each length (paper 4.3.1, the long-document table); by causality also one pass
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yarn_edge.errors import YarnEdgeError

STRIDE = 256  # S in the paper


@dataclass(frozen=True)
class Window:
    """Tokens evaluated from position 0 on; those from index `first` (at least 1) to the end are scored.

    document: number of the document; start: index in the document of the window's first token.
    """

    document: int
    start: int
    tokens: tuple[int, ...]
    first: int

    @property
    def n_scored(self) -> int:
        """Number of tokens that get a score."""
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class Cut:
    """How to cut. ctx: tokens of a window; stride: for `sliding`; chunks: maximum number of windows; bos: first token, or None."""

    ctx: int
    stride: int = STRIDE
    chunks: int | None = None
    bos: int | None = None


def _piece(document: int, tokens: Sequence[int], start: int, cut: Cut, first: int) -> Window:
    """A window of the document from `start` on. BOS replaces its first token, as in llama-perplexity."""
    part = list(tokens[start : start + cut.ctx])
    if cut.bos is not None:
        part[0] = cut.bos
    return Window(document, start, tuple(part), first)


def curve(document: int, tokens: Sequence[int], cut: Cut) -> list[Window]:
    """The first pieces of ctx tokens (one, unless `chunks` says more); the last one may be shorter."""
    starts = range(0, len(tokens) - 1, cut.ctx)[: cut.chunks or 1]
    return [_piece(document, tokens, at, cut, 1) for at in starts]


def llama_cpp(document: int, tokens: Sequence[int], cut: Cut) -> list[Window]:
    """Whole chunks of ctx tokens, of which those from index ctx/2 + 1 on are scored."""
    starts = range(0, len(tokens) - cut.ctx + 1, cut.ctx)[: cut.chunks]
    return [_piece(document, tokens, at, cut, cut.ctx // 2 + 1) for at in starts]


def sliding(document: int, tokens: Sequence[int], cut: Cut) -> list[Window]:
    """Windows with BOS in front: the first is scored whole, of each later one the last `stride` tokens."""
    body = list(tokens[1:] if cut.bos is not None else tokens)
    lead = [] if cut.bos is None else [cut.bos]
    room, scored, windows = cut.ctx - len(lead), 0, []
    for start in range(0, len(body), cut.stride):
        end = min(start + room, len(body))
        part = (*lead, *body[start:end])
        windows.append(Window(document, start, part, max(1, len(part) - (end - scored))))
        scored = end
        if end == len(body):
            break
    return windows[: cut.chunks]


# protocol -> (how to cut a document, whether only whole windows count)
PROTOCOLS: dict[str, tuple[Callable[[int, Sequence[int], Cut], list[Window]], bool]] = {
    "curve": (curve, False),
    "llama.cpp": (llama_cpp, True),
    "sliding": (sliding, False),
    "truncated": (curve, False),
}


def tokens_needed(protocol: str, cut: Cut) -> int | None:
    """Number of tokens of a document that the protocol uses; None for all."""
    if protocol == "sliding":
        return None if cut.chunks is None else cut.ctx + (cut.chunks - 1) * cut.stride
    if protocol == "truncated":
        return cut.ctx
    return cut.ctx * (cut.chunks or 1) if protocol == "curve" or cut.chunks is not None else None


def windows_of(protocol: str, documents: Sequence[Sequence[int]], cut: Cut) -> list[Window]:
    """All windows, document by document. Raises YarnEdgeError if there is nothing to score."""
    make, whole_only = PROTOCOLS[protocol]
    windows = [w for i, tokens in enumerate(documents) for w in make(i, tokens, cut)]
    if whole_only:
        windows = [w for w in windows if len(w.tokens) == cut.ctx]
    if protocol == "llama.cpp" and cut.chunks is not None:
        windows = windows[: cut.chunks]
    windows = [w for w in windows if w.n_scored > 0]
    if not windows:
        longest = max(map(len, documents), default=0)
        if protocol == "llama.cpp" and cut.ctx < 3:
            raise YarnEdgeError("--protocol llama.cpp scores the second half of a window: it needs --ctx 3 or more")
        needed = f"--protocol {protocol} scores windows of {cut.ctx} tokens" if whole_only else "the minimum is 2"
        raise YarnEdgeError(f"the longest text has {longest} tokens, and {needed}: use more text or a smaller --ctx")
    return windows
