"""`yarn-edge demo`: the whole road on a real small model, with the commands that anybody would type.

SmolLM2-135M-Instruct (context 8192) becomes a checkpoint with YaRN factor 4, that checkpoint a Q4_K_M GGUF, the GGUF is
verified against the checkpoint, and what YaRN is for is measured: perplexity beyond 8192 tokens with and without it. The
model was never fine-tuned for factor 4; what the numbers show is that positions are right, not that the model is good.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import add_threads_flag
from yarn_edge.llama_rules.effective import ROPE_SCALING_TYPES, RuntimeArguments
from yarn_edge.progress import note
from yarn_edge.report.pictures import draw
from yarn_edge.report.report import Chart, Line
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.stdout import write_text

from .evidence.smollm2 import CONTEXT, write_checkpoint
from .scoring.averages import Bucket, perplexity_by_position
from .scoring.evaluate import token_nll

FACTOR = 4
YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": float(FACTOR), "original_max_position_embeddings": CONTEXT},
    "max_position_embeddings": CONTEXT * FACTOR,
}
QUESTION = "Explain photosynthesis in one sentence."
DEFAULT_TOKENS = 12288
BUCKET = 1024


def _command(*words: str) -> None:
    """Show a command and run it; a check that fails ends the demo."""
    write_text(f"\n$ yarn-edge {shlex.join(words)}\n")
    waiting, sys.stdin = sys.stdin, Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - chat would read it
    try:
        code = main(words)
    finally:
        sys.stdin.close()
        sys.stdin = waiting
    if code:
        raise YarnEdgeError(f"the demo stopped: yarn-edge {words[0]} ended with exit code {code}")


def _said(text: str) -> None:
    write_text(f"{text}\n")


def measure(model_path: Path, n_tokens: int, threads: int | None) -> dict[str, list[Bucket]]:
    """Perplexity by position, with the file's YaRN and with plain RoPE (a runtime argument)."""
    plain = RuntimeArguments(rope_scaling_type=ROPE_SCALING_TYPES["none"])
    with Model(model_path) as model:
        tokens = model.tokenize(sample_text(), add_special=model.add_bos, parse_special=False)
        if len(tokens) < n_tokens:
            raise YarnEdgeError(f"--tokens {n_tokens}: the text that comes along has {len(tokens)}")
        edges = [*range(0, n_tokens, BUCKET), n_tokens]
        found = {}
        for name, arguments in (("YaRN", None), ("plain RoPE", plain)):
            nll = token_nll(model, tokens[:n_tokens], arguments=arguments, threads=threads, label=f"Reading, {name}")
            found[name] = perplexity_by_position(nll, edges)
    return found


def _show(found: dict[str, list[Bucket]]) -> None:
    _said(f"\n{'tokens at position':<24}" + "".join(f"{name:>14}" for name in found))
    for row in zip(*found.values(), strict=True):
        place = f"{row[0].start} - {row[0].end}"
        _said(f"{place:<24}" + "".join(f"{bucket.perplexity:>14.2f}" for bucket in row))


def demo(
    folder: Path, n_tokens: int, *, force: bool = False, threads: int | None = None, plot: Path | None = None
) -> dict[str, Any]:
    """Run everything in `folder`. Returns the perplexities and the time it took, as JSON-able values."""
    began = time.perf_counter()
    checkpoint, model = folder / "smollm2-135m-yarn4", folder / "smollm2-135m-yarn4.Q4_K_M.gguf"
    if not force and (checkpoint.exists() or model.exists()):
        raise YarnEdgeError(f"{folder}: holds an earlier demo already; --force overwrites it")
    folder.mkdir(parents=True, exist_ok=True)
    note(f"Writing SmolLM2-135M-Instruct with YaRN factor {FACTOR} as a checkpoint: {checkpoint}")
    write_checkpoint(checkpoint, config=YARN)
    _command("convert", str(checkpoint), "-o", str(model), "--quant", "Q4_K_M", *(["--force"] if force else []))
    _command("inspect", str(model))
    _command("verify", str(model), "--against", str(checkpoint))
    _said("")
    note(f"Perplexity by position, two passes over {n_tokens} tokens (the model was trained on {CONTEXT})")
    found = measure(model, n_tokens, threads)
    _show(found)
    if plot is not None:
        draw_curves(found, CONTEXT, plot)
        note(f"{plot}: the picture")
    _command("chat", str(model), "-p", QUESTION, "--temperature", "0", "--max-tokens", "80")
    seconds = time.perf_counter() - began
    _said(f"\nDone in {seconds:.0f} s. Now talk to it: python -m yarn_edge.chat {shlex.quote(str(model))}")
    return {
        "perplexity": {name: [vars(b) for b in buckets] for name, buckets in found.items()},
        "seconds": seconds,
        "model": str(model),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge demo`."""
    parser.add_argument("-o", "--output", default="yarn-edge-demo", metavar="DIR", help="working folder (%(default)s)")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, metavar="N", help="tokens to read (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite what an earlier demo left in DIR")
    add_threads_flag(parser)
    parser.add_argument("--numbers", metavar="FILE.json", help="also write the numbers as JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw perplexity by position (needs yarn-edge[plot])")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge demo`."""
    if args.tokens < 16:
        raise YarnEdgeError(f"--tokens {args.tokens}: need at least 16")
    plot = None if args.plot is None else Path(args.plot)
    found = demo(Path(args.output), args.tokens, force=args.force, threads=args.threads, plot=plot)
    if args.numbers:
        Path(args.numbers).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def draw_curves(curves: Mapping[str, Sequence[Bucket]], trained_context: int, path: Path) -> None:
    """Perplexity (log scale) over token position, one line a curve, the trained context marked. Writes `path`."""
    lines = tuple(
        Line(name, tuple((b.start + b.end) / 2 for b in buckets), tuple(b.perplexity for b in buckets))
        for name, buckets in curves.items()
    )
    marks = ((float(trained_context), f"trained context {trained_context}"),)
    chart = Chart("Perplexity by position", "position (tokens)", "perplexity", lines, log_y=True, marks=marks)
    draw([chart], path)
