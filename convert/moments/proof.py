"""What calibrated files lose on text that did not calibrate them: KL to their source on the end of each text, which is held out, and on
a text of another kind, the bundled one.

The source runs first, alone, and its logits are kept on the disk; then each file runs alone: one model in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from yarn_edge.attention.policy import choose_attention
from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.opening import open_context
from yarn_edge.likelihood import Float32, Float64, Rows
from yarn_edge.progress import bar, note
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text

HELD_OUT, OTHER_KIND = "held_out", "other_kind"  # kinds of text
PROOF_TOKENS = 2048  # of each kind, and of one window at most
LEAST_HELD_OUT = 128  # tokens of a text
_BATCH, _SCORED_BATCH = 512, 128  # tokens of one call, and with logits
_PROBES, _PROBE = 50, 40  # parts of the bundled text that are looked for, and their characters


def held_out_tokens(n_tokens: int, n_texts: int) -> int:
    """How many tokens at the end of a text of `n_tokens` do not calibrate: 0 if it is too short."""
    n = min(PROOF_TOKENS // n_texts, n_tokens // 8)
    return n if n >= LEAST_HELD_OUT else 0


def proof_windows(source: Path, texts: Mapping[str, str]) -> dict[str, list[list[int]]]:
    """Windows of tokens by kind of text, without HELD_OUT if all texts are too short for it. texts: names and contents; they calibrate."""
    with Model(source, vocab_only=True) as model:
        held: list[list[int]] = []
        for name, text in texts.items():
            tokens = model.tokenize(text, add_special=False, parse_special=False)
            n = held_out_tokens(len(tokens), len(texts))
            if not n:
                note(f"note: {name}: its {len(tokens)} tokens are too few to hold some out for the proof")
            held += _windows(tokens[len(tokens) - n :], model)
        other = model.tokenize(sample_text(), add_special=False, parse_special=False)[:PROOF_TOKENS]
        kinds = {HELD_OUT: held, OTHER_KIND: _windows(other, model)}
    for name, text in texts.items():
        if _has_bundled_text(text):
            note(f"note: {name} contains the bundled text, which is therefore not of another kind")
    return {kind: windows for kind, windows in kinds.items() if windows}


def _windows(tokens: Sequence[int], model: Model) -> list[list[int]]:
    """Windows as long as the model, with BOS in place of the first token if it wants one, as in `compare`."""
    length = min(PROOF_TOKENS, model.gguf.required_int("context_length"), len(tokens))
    begin = [model.bos] if model.add_bos else []
    starts = range(0, len(tokens) - length + 1, length) if length else ()
    return [[*begin, *tokens[start + len(begin) : start + length]] for start in starts]


def _has_bundled_text(text: str) -> bool:
    bundled = sample_text()
    step = len(bundled) // _PROBES
    found = sum(bundled[at : at + _PROBE] in text for at in range(0, len(bundled) - _PROBE, step))
    return 4 * found > _PROBES  # line breaks are elsewhere


def n_scored(window: Sequence[int]) -> int:
    """Tokens of a window that are scored: those of its second half, of which each has the first half before it."""
    return len(window) - 1 - len(window) // 2


def logit_bytes(source: Path, windows: Sequence[Sequence[int]]) -> int:
    """The size of the source's logits on the disk."""
    with Model(source, vocab_only=True) as model:
        return 4 * model.n_vocab * sum(map(n_scored, windows))


def kl_of(
    source: Path, files: Sequence[Path], windows: Sequence[Sequence[int]], folder: Path, threads: int | None
) -> list[list[Float64]]:
    """KL(source || file) in nats, for each file an array for each window, (n_scored,). folder: for the source's logits.

    Raises YarnEdgeError for logits that are not finite.
    """
    ends = list(accumulate(map(n_scored, windows)))
    n_rows = ends[-1]
    total = (1 + len(files)) * sum(len(window) - 1 for window in windows)
    log_z, top = np.empty(n_rows), np.empty(n_rows, np.int64)
    kept: Float32 | None = None
    found: list[list[Float64]] = []
    with Rows(threads or physical_threads()) as rows, bar("Proof", total, "tokens") as advance:
        for at, logits in _scored_rows(source, windows, threads, advance, False):
            if kept is None:
                shape = (n_rows, logits.shape[1])
                kept = np.memmap(folder / "logits.bin", np.float32, "w+", shape=shape)
            part = slice(at, at + len(logits))
            kept[part], log_z[part], top[part] = logits, rows.log_normalizers(logits), logits.argmax(axis=1)
        assert kept is not None
        for file in files:
            kl = np.empty(n_rows)
            for at, logits in _scored_rows(file, windows, threads, advance, True):
                part = slice(at, at + len(logits))
                targets = np.zeros(len(logits), np.int64)  # their likelihoods are not used
                kl[part] = rows.divergences(kept[part], log_z[part], top[part], logits, targets).kl
            if not np.isfinite(kl).all():
                raise YarnEdgeError(f"{file}: its predictions, or those of {source}, are not finite numbers")
            found.append(np.split(kl, ends[:-1]))
    return found


def _scored_rows(
    path: Path, windows: Sequence[Sequence[int]], threads: int | None, advance: Callable[[float], None], trust: bool
) -> Iterator[tuple[int, Float32]]:
    """(number of the first row, rows of logits, valid until the next) of the scored tokens. trust: the file is our own."""
    n_ctx = max(map(len, windows))
    wanted = ContextSettings(n_ctx=n_ctx, n_batch=_BATCH, n_outputs=_SCORED_BATCH, threads=threads, attention="auto")
    at = 0
    with (
        Model(path, trust=trust) as model,
        open_context(model, choose_attention(wanted, model.gguf, on_cpu=True)) as context,
    ):
        for window in windows:
            half, end = len(window) // 2, len(window) - 1
            context.clear()
            context.evaluate(window[:half], 0, "none", advance)
            for start in range(half, end, _SCORED_BATCH):
                part = window[start : min(start + _SCORED_BATCH, end)]
                context.evaluate(part, start, "all", advance)
                yield at, context.logits_in_place()
                at += len(part)
