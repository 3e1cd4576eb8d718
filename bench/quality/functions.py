"""The commands perplexity and compare as functions for Python. They return what the commands print with --json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError

from ..scoring.variants import parse_variant
from ..scoring.windows import PROTOCOLS
from .compare import compare
from .compare_outcome import ComparisonOutcome
from .perplexity import score_text
from .perplexity_outcome import PerplexityOutcome
from .text_settings import TextSettings


def measure_perplexity(
    model: str | Path,
    text: str | Path | None = None,
    *,
    ctx: int | None = None,
    protocol: str = "curve",
    chunks: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Perplexity by context length and by position, as the JSON object of `yarn-edge perplexity` (docs/perplexity.md).

    model: a GGUF, or a variant of one: "model.gguf@kv=q8_0,yarn-factor=2". text: a text file, a folder of them, or JSON Lines
    (default: the bundled text). ctx: tokens per window (default: the model's context). protocol: curve, llama.cpp, sliding or
    truncated. chunks: maximum number of windows. max_tokens: maximum number of tokens over all documents.
    Raises YarnEdgeError for bad input; if the run ends early, raises whatever ended it.
    """
    settings = _settings(text, ctx, protocol, chunks, max_tokens)  # refuses bad arguments before a file is read
    variant = parse_variant(str(model))
    scored = score_text(variant, settings, threads=threads)
    if scored.ended is not None:
        raise scored.ended
    return PerplexityOutcome.of(variant, settings, scored).as_json()


def compare_models(
    base: str | Path,
    others: Sequence[str | Path],
    text: str | Path | None = None,
    *,
    ctx: int | None = None,
    protocol: str = "curve",
    chunks: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """KL divergence of each model from `base`, by position, as the JSON object of `yarn-edge compare` (docs/compare.md).

    base, others: GGUFs, or variants of them: "model.gguf@kv=q8_0". The other parameters are those of `measure_perplexity`.
    Raises YarnEdgeError for bad input, such as models with different vocabularies.
    """
    settings = _settings(text, ctx, protocol, chunks, max_tokens)
    first, *rest = (parse_variant(str(model)) for model in (base, *others))
    comparison, n_ctx = compare(first, rest, settings, threads=threads)
    if comparison.ended is not None:
        raise comparison.ended
    return ComparisonOutcome.of(comparison, n_ctx, settings).as_json()


def _settings(
    text: str | Path | None, ctx: int | None, protocol: str, chunks: int | None, max_tokens: int | None
) -> TextSettings:
    if protocol not in PROTOCOLS:
        raise YarnEdgeError(f"protocol {protocol!r} is unknown; known: {', '.join(PROTOCOLS)}")
    return TextSettings(None if text is None else str(text), protocol, ctx, chunks=chunks, max_tokens=max_tokens)
