"""The check of `verify --effect`: how well the model predicts a text with its scaling and without it.

A scaling that the config claims and that nobody trained with makes predictions worse at positions that the model knew before. Both
runs are of the same file: without it, every ROPE node is given plain RoPE (`yarn_edge.graph.live_rope`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.opening import open_context
from yarn_edge.llama_rules.angle_error import angle_error
from yarn_edge.llama_rules.effective import LivePositions, RuntimeArguments, as_table
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling
from yarn_edge.progress import Advance, bar
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.devices import devices_of, missing
from yarn_edge.runtime.model import Model
from yarn_edge.text_file import read_text
from yarn_edge.verify.checks import Check, judge, on_backend, skipped
from yarn_edge.verify.transformers_reference import log_softmax

Floats = npt.NDArray[np.float64]
BATCH, BLOCK, LEAST = 128, 64, 256
_CHARACTERS = 16  # that are tokenized for each token of the context


def check_effect(
    path: str | Path, text: Path, n_ctx: int | None = None, threads: int | None = None, backend: str = "cpu"
) -> Check:
    """Perplexity with the scaling / without it, over the beginning of `text`; above 1 by more than its error, the check fails.

    n_ctx: tokens, None for twice the original context, at most the extended one. Raises YarnEdgeError for a text of less than LEAST tokens.
    """
    name, devices = on_backend("effect", backend), devices_of(backend)
    if not devices:
        return skipped(name, missing(backend))
    with Model(path, device=devices[0]) as model:
        wanted = model.positions.at(n_ctx).wanted
        if wanted.method == "none" and wanted.frequency_factors is None:
            return skipped(name, "the file has no scaling")
        if abs(wanted.softmax_factor - 1) > SAME_RELATIVE:
            return skipped(name, "its scaling also changes the softmax scale, which cannot be taken away")
        size = n_ctx or min(wanted.extended_context, 2 * wanted.original_context)
        words = read_text(text)[: size * _CHARACTERS]
        tokens = model.tokenize(words, add_special=model.add_bos, parse_special=False)[:size]
        if len(tokens) < LEAST:
            raise YarnEdgeError(
                f"{text}: has {len(tokens)} tokens, too few to measure an effect: give at least {LEAST}"
            )
        runs = {"with": None, "without": without_scaling(model.positions.at(n_ctx), wanted)}
        with bar("Measuring the scaling's effect", 2 * len(tokens), "tokens") as advance:
            scores = {key: _nll(model, tokens, arguments, threads, advance) for key, arguments in runs.items()}
    return _judged(name, wanted.original_context, scores["with"], scores["without"])


def without_scaling(positions: FilePositions, wanted: RopeScaling) -> RuntimeArguments:
    """Arguments under which every layer that the scaling is for runs plain RoPE with the model's own base."""
    plain = as_table(RopeScaling("none", wanted.rope_theta, wanted.dim, wanted.extended_context))
    own = positions.explicit_arguments
    sliding = None if own.live is None else own.live.sliding
    if own.live is None:
        windows = positions.effective_sliding(own)
        if windows is not None and not angle_error(windows, positions.runs).any_difference:
            sliding = plain
    return replace(own, live=LivePositions(plain, sliding))


def _nll(
    model: Model, tokens: Sequence[int], arguments: RuntimeArguments | None, threads: int | None, advance: Advance
) -> Floats:
    """Negative log-likelihoods in nats of tokens[1:]."""
    settings = ContextSettings(n_ctx=len(tokens), n_batch=BATCH, threads=threads, arguments=arguments)
    parts = []
    with open_context(model, settings) as context:
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            context.evaluate(part, start, "all", advance)
            targets = np.asarray(tokens[start + 1 : start + BATCH + 1], dtype=np.int64)
            rows = log_softmax(context.logits()[: len(targets)])
            parts.append(-rows[np.arange(len(targets)), targets])
    return np.concatenate(parts)


def _judged(name: str, original: int, scaled: Floats, plain: Floats) -> Check:
    if not (np.isfinite(scaled).all() and np.isfinite(plain).all()):
        return Check(name, "fail", math.inf, 1.0, "the model's predictions are not finite")
    apart = scaled - plain
    whole, error = _mean(apart)
    told = [
        f"perplexity {_perplexity(scaled)} with the scaling, {_perplexity(plain)} without it, over {len(scaled)} tokens"
    ]
    data: dict[str, float | None] = {"n_tokens": len(scaled)}
    for where, part in (("inside", slice(0, original - 1)), ("beyond", slice(original - 1, None))):
        if len(scaled[part]) < BLOCK:
            continue
        told.append(f"{where} the original context {_perplexity(scaled[part])} and {_perplexity(plain[part])}")
        data[f"{where}_with"], data[f"{where}_without"] = (math.exp(side[part].mean()) for side in (scaled, plain))
    inside, inside_error = _mean(apart[: original - 1])
    if inside > 3 * inside_error:
        told.append("inside it these weights fit plain RoPE better, as if nothing was trained with the scaling")
    return judge(name, math.exp(whole), math.exp(3 * error), "; ".join(told), data)


def _mean(values: Floats) -> tuple[float, float]:
    """(mean, its standard error, from means of blocks: neighbors are alike)."""
    blocks = [part.mean() for part in np.array_split(values, max(2, len(values) // BLOCK))]
    return float(values.mean()), float(np.std(blocks, ddof=1) / math.sqrt(len(blocks)))


def _perplexity(nll: Floats) -> str:
    return f"{math.exp(nll.mean()):.4g}"
