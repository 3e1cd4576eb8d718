"""The scoring pass: windows of tokens through one context, with logits only where a token is scored, turned into numbers at once.

Memory holds the model, the cache, and one batch of logits. The size of a batch depends on the vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.attention.policy import choose_attention
from yarn_edge.averages import Mean
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.graph.opening import open_context
from yarn_edge.likelihood import Float32, Float64, Int, Rows
from yarn_edge.llama_rules.effective import RuntimeArguments
from yarn_edge.progress import bar
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.model import Model
from yarn_edge.signals import deferred_ctrl_c

from .variants import Variant
from .windows import Window

LOGIT_BYTES = 128 << 20  # of one batch
MAX_BATCH, MIN_BATCH = 512, 64


def batch_settings(
    file: GGUFFile,
    n_vocab: int,
    variant: Variant,
    n_ctx: int,
    threads: int | None = None,
    attention: Attention = "auto",
) -> ContextSettings:
    """The settings for windows of `n_ctx` tokens: attention by the policy, and batches whose logits take at most LOGIT_BYTES.

    Every batch is one graph, so n_batch is also limited by what the policy allows for one graph.
    """
    n_batch = MAX_BATCH
    while n_batch > MIN_BATCH and n_batch * n_vocab * 4 > LOGIT_BYTES:
        n_batch //= 2
    wanted = variant.settings(n_ctx=n_ctx, n_batch=n_batch, threads=threads, attention=attention)
    chosen = choose_attention(wanted, file, on_cpu=variant.backend == "cpu")
    return replace(chosen, n_batch=chosen.n_ubatch or n_batch)


@dataclass(frozen=True)
class ScoredBatch:
    """Logits (n, n_vocab) that predict `targets` (n,). first: index in the window of the first target.

    The logits are llama.cpp's own buffer, valid until the next evaluation.
    """

    first: int
    targets: Int
    logits: Float32


def batches(
    contexts: Sequence[Context],
    window: Window,
    advance: Callable[[int], None],
    *,
    done: int = 0,
    spent: list[float] | None = None,
) -> Iterator[tuple[ScoredBatch, ...]]:
    """Evaluate the window from token `done` on (earlier ones are in the caches). Yields each batch that has targets, as one
    ScoredBatch per context.

    advance: gets the number of tokens of each batch after it was evaluated and the consumer is done with it. spent: collects the
    seconds of evaluation by context. The last token is never evaluated, because nothing follows it.
    """
    tokens = window.tokens
    step = min(context.n_batch for context in contexts)
    for at in range(done, len(tokens) - 1, step):
        part = tokens[at : min(at + step, len(tokens) - 1)]
        scored = min(len(part), max(0, at + len(part) - (window.first - 1)))
        targets = np.asarray(tokens[at + len(part) - scored + 1 : at + len(part) + 1], dtype=np.int64)
        scored_batches = []
        for number, context in enumerate(contexts):
            start = time.perf_counter()
            context.evaluate(part, at, scored)
            if spent is not None:
                context.synchronize()
                spent[number] += time.perf_counter() - start
            if scored:
                scored_batches.append(ScoredBatch(at + len(part) - scored + 1, targets, context.logits_in_place()))
        if scored:
            yield tuple(scored_batches)
        advance(len(part))


@dataclass
class Scores:
    """Negative log-likelihoods in nats, one array (n_scored,) per window, NaN if not scored yet.

    seconds, tokens: time spent and tokens evaluated in this process. done: number of finished windows. inside: tokens of the
    next window whose successors are scored.
    """

    windows: Sequence[Window]
    nll: list[Float64]
    seconds: float = 0.0
    tokens: int = 0
    done: int = 0
    inside: int = 0
    _sum: float = 0.0
    _count: int = 0

    @classmethod
    def empty(cls, windows: Sequence[Window]) -> Scores:
        """Scores with nothing scored yet."""
        return cls(windows, [np.full(w.n_scored, np.nan) for w in windows])

    @property
    def n_scored(self) -> int:
        """Number of tokens with a score."""
        return sum(int(np.isfinite(part).sum()) for part in self.nll)

    def flat(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Float64]:
        """(index in the window, document, nll) of every token with a score, as three arrays."""
        at = [np.arange(w.first, len(w.tokens)) for w in self.windows]
        of = [np.full(w.n_scored, w.document) for w in self.windows]
        index, document, nll = (np.concatenate(parts) for parts in (at, of, self.nll))
        there = np.isfinite(nll)
        return index[there], document[there], nll[there]

    def put(self, at: int, nll: Float64) -> None:
        """Store scores of the current window, from its scored token number `at` on."""
        self.nll[self.done][at : at + len(nll)] = nll
        self._sum, self._count = self._sum + float(nll.sum()), self._count + len(nll)

    @property
    def running(self) -> Mean:
        """The mean of the scores of this process."""
        return Mean(self._count, self._sum / self._count if self._count else math.nan, math.nan)


def score(
    context: Context,
    scores: Scores,
    *,
    label: str = "Perplexity",
    between: Callable[[Scores], None] = lambda _scores: None,
    threads: int | None = None,
) -> None:
    """Fill `scores` from where they end; the cache must hold the finished part of the current window.

    between: called after each batch, to save. Raises YarnEdgeError for logits that are not finite; earlier scores are kept.
    """
    left = sum(len(w.tokens) - 1 for w in scores.windows[scores.done :]) - scores.inside
    with Rows(threads or physical_threads()) as rows, stoppable(context), bar(label, left, "tokens") as shown:
        clock = time.perf_counter()

        def advance(n: int) -> None:
            nonlocal clock
            now = time.perf_counter()
            scores.seconds, clock = scores.seconds + now - clock, now
            scores.tokens, scores.inside = scores.tokens + n, scores.inside + n
            shown(n, f"{scores.running.perplexity:.4f}")
            between(scores)

        while scores.done < len(scores.windows):
            window = scores.windows[scores.done]
            if not scores.inside:
                context.clear()
            for (batch,) in batches([context], window, advance, done=scores.inside):
                nll = rows.nll(batch.logits, batch.targets)
                check_finite(nll, window, batch.first, context.model.path)
                scores.put(batch.first - window.first, nll)
            scores.done, scores.inside = scores.done + 1, 0


@contextmanager
def stoppable(*contexts: Context) -> Iterator[None]:
    """While open, Ctrl-C and similar signals stop a running evaluation midway, and are raised as usual."""
    with ExitStack() as stack:
        stops = [stack.enter_context(context.interruptible()) for context in contexts]

        def stop_all() -> None:
            for stop in stops:
                stop()

        stack.enter_context(deferred_ctrl_c(stop_all))
        yield


def check_finite(values: Float64, window: Window, first: int, path: Path) -> None:
    """Raise YarnEdgeError, with the position, for NaN and infinity."""
    if np.isfinite(values).all():
        return
    at = int(np.flatnonzero(~np.isfinite(values))[0])
    kind = "not a number" if np.isnan(values[at]) else "infinite"
    raise YarnEdgeError(
        f"{path}: the prediction at position {first + at - 1} of window {window.document + 1} is {kind}: the weights or the "
        "scaling are broken there"
    )


def token_nll(
    model: Model,
    tokens: Sequence[int],
    *,
    arguments: RuntimeArguments | None = None,
    kv_type: str = "f16",
    threads: int | None = None,
    score_from: int = 1,
    label: str = "Perplexity",
) -> Float64:
    """Negative log-likelihood in nats of tokens[1:], each given all tokens before it; shape (n_tokens - 1,).

    arguments: scaling values for the context, by default the file's own. score_from: tokens before this position are not
    scored (NaN), which saves their logits.
    """
    window = Window(0, 0, tuple(tokens), max(1, score_from))
    variant = Variant(str(model.path), model.gguf, kv_type, arguments=arguments)
    scores = Scores.empty([window])
    with variant_context(model, variant, len(tokens), threads) as context:
        score(context, scores, label=label, threads=threads)
    return np.concatenate([np.full(window.first - 1, np.nan), scores.nll[0]])


def variant_context(
    model: Model, variant: Variant, n_ctx: int, threads: int | None = None, attention: Attention = "auto"
) -> Context:
    """A context for windows of `n_ctx` tokens, with `batch_settings`."""
    return open_context(model, batch_settings(model.gguf, model.n_vocab, variant, n_ctx, threads, attention))
