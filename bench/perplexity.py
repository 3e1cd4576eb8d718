"""Perplexity by position from one causal pass: the negative log-likelihood of every token, batch by batch.

A causal model scores every prefix at once, so one run gives every bucket. Logits live for one batch only: memory is the
model, the cache, and batch x vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from yarn_edge.effective import RuntimeArguments
from yarn_edge.progress import bar
from yarn_edge.runtime import Context, Model

BATCH = 512


@dataclass(frozen=True)
class Bucket:
    """Tokens predicted at positions [start, end): their number and their perplexity."""

    start: int
    end: int
    n_tokens: int
    perplexity: float


def token_nll(
    model: Model,
    tokens: Sequence[int],
    *,
    arguments: RuntimeArguments | None = None,
    kv_type: str = "f16",
    threads: int | None = None,
    score_from: int = 0,
    label: str = "Perplexity",
) -> npt.NDArray[np.float64]:
    """Negative log-likelihood in nats of tokens[1:], each given all before it; shape (n_tokens - 1,).

    arguments: scaling values for the context, by default the file's own. score_from: predictions of tokens before this
    position are not scored (NaN), which saves their logits.
    """
    found = np.full(len(tokens) - 1, np.nan)
    with (
        Context(
            model, n_ctx=len(tokens), n_batch=BATCH, kv_type=kv_type, arguments=arguments, threads=threads
        ) as context,
        bar(label, len(tokens), "tokens") as advance,
    ):
        for start in range(0, len(tokens), BATCH):
            part = list(tokens[start : start + BATCH])
            if start + len(part) < score_from:
                context.evaluate(part, start, "none", advance)
                continue
            context.evaluate(part, start, "all", advance)
            targets = np.asarray(tokens[start + 1 : start + len(part) + 1])
            logits = context.logits()[: len(targets)]
            peak = logits.max(axis=1, keepdims=True)
            log_sum = np.log(np.exp(logits - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
            first = max(0, score_from - 1 - start)
            found[start + first : start + len(targets)] = (log_sum - logits[np.arange(len(targets)), targets])[first:]
    return found


def by_position(nll: npt.NDArray[np.float64], edges: Sequence[int]) -> list[Bucket]:
    """Perplexity between consecutive `edges` (positions of the predicted token; the first predicted is 1)."""
    buckets = []
    for start, end in pairwise(edges):
        part = nll[max(0, start - 1) : end - 1]
        if len(part):
            buckets.append(Bucket(start, end, len(part), float(np.exp(part.mean()))))
    return buckets
