"""`yarn-edge demo`: every step on a real small model, with the commands that anyone would type.

SmolLM2-135M-Instruct (context 8192) becomes a checkpoint with YaRN factor 4, and the checkpoint a Q4_K_M GGUF. The GGUF is verified
against the checkpoint, and perplexity beyond 8192 tokens is measured with and without YaRN. The model was never fine-tuned for
factor 4: the numbers show that its positions are right, not that the model is good.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.averages import Bucket, perplexity_by_position
from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import add_threads_flag, add_trust_flag, length
from yarn_edge.llama_rules.effective import ROPE_SCALING_TYPES, RuntimeArguments
from yarn_edge.progress import note
from yarn_edge.report.pictures import draw
from yarn_edge.report.report import Chart, Line
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.stdout import json_text, write_text
from yarn_edge.writer import partial_folder, publish_folder, write_file

from .evidence.smollm2 import CONTEXT, write_checkpoint
from .scoring.evaluate import token_nll

FACTOR = 4
YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": float(FACTOR), "original_max_position_embeddings": CONTEXT},
    "max_position_embeddings": CONTEXT * FACTOR,
}
QUESTION = "Explain photosynthesis in one sentence."
DEFAULT_TOKENS = 12288
BUCKET = 1024

Curves = Mapping[str, Sequence[Bucket]]


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo measured: perplexity by position for each way of running the model, and the seconds that everything took."""

    perplexity: Curves
    seconds: float
    model: Path

    def as_json(self) -> dict[str, Any]:
        """The object of --numbers."""
        curves = {name: [vars(bucket) for bucket in buckets] for name, buckets in self.perplexity.items()}
        return {"perplexity": curves, "seconds": self.seconds, "model": str(self.model)}


def demo(
    folder: Path, n_tokens: int, *, force: bool = False, threads: int | None = None, plot: Path | None = None
) -> DemoOutcome:
    """Run everything in `folder`. Raises YarnEdgeError if a command fails, or if an earlier demo is there and not `force`."""
    began = time.perf_counter()
    checkpoint, model = folder / "smollm2-135m-yarn4", folder / "smollm2-135m-yarn4.Q4_K_M.gguf"
    if not force and (checkpoint.exists() or model.exists()):
        raise YarnEdgeError(f"{folder}: holds an earlier demo already; --force overwrites it")
    folder.mkdir(parents=True, exist_ok=True)
    note(f"Writing SmolLM2-135M-Instruct with YaRN factor {FACTOR} as a checkpoint: {checkpoint}")
    with partial_folder(checkpoint) as partial:
        publish_folder(write_checkpoint(partial, config=YARN), checkpoint, force)
    _command("convert", str(checkpoint), "-o", str(model), "--quant", "Q4_K_M", *(["--force"] if force else []))
    _command("inspect", str(model))
    _command("verify", str(model), "--against", str(checkpoint))
    write_text("\n")
    note(f"Perplexity by position, two passes over {n_tokens} tokens (the model was trained on {CONTEXT})")
    curves = perplexity_curves(model, n_tokens, threads)
    write_text(_table(curves))
    if plot is not None:
        draw_curves(curves, CONTEXT, plot)
        note(f"{plot}: the picture")
    _command("chat", str(model), "-p", QUESTION, "--temperature", "0", "--max-tokens", "80")
    seconds = time.perf_counter() - began
    write_text(f"\nDone in {seconds:.0f} s. Now talk to it: python -m yarn_edge.chat {shlex.quote(str(model))}\n")
    return DemoOutcome(curves, seconds, model)


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


def perplexity_curves(model_path: Path, n_tokens: int, threads: int | None) -> dict[str, list[Bucket]]:
    """Perplexity by position, with the file's YaRN and with plain RoPE (a runtime argument)."""
    plain = RuntimeArguments(rope_scaling_type=ROPE_SCALING_TYPES["none"])
    with Model(model_path) as model:
        tokens = model.tokenize(sample_text(), add_special=model.add_bos, parse_special=False)
        if len(tokens) < n_tokens:
            raise YarnEdgeError(f"--tokens {n_tokens}: the bundled text has only {len(tokens)} tokens")
        edges = [*range(0, n_tokens, BUCKET), n_tokens]
        curves = {}
        for name, arguments in (("YaRN", None), ("plain RoPE", plain)):
            nll = token_nll(model, tokens[:n_tokens], arguments=arguments, threads=threads, label=f"Reading, {name}")
            curves[name] = perplexity_by_position(nll, edges)
    return curves


def _table(curves: Curves) -> str:
    lines = [f"\n{'tokens at position':<24}" + "".join(f"{name:>14}" for name in curves)]
    for row in zip(*curves.values(), strict=True):
        place = f"{row[0].start} - {row[0].end}"
        lines.append(f"{place:<24}" + "".join(f"{bucket.perplexity:>14.2f}" for bucket in row))
    return "".join(f"{line}\n" for line in lines)


def draw_curves(curves: Curves, trained_context: int, path: Path) -> None:
    """Write the picture `path`: perplexity (log scale) by token position, a line for each curve, the trained context marked."""
    lines = tuple(
        Line(name, tuple((b.start + b.end) / 2 for b in buckets), tuple(b.perplexity for b in buckets))
        for name, buckets in curves.items()
    )
    marks = ((float(trained_context), f"trained context {trained_context}"),)
    chart = Chart("Perplexity by position", "position (tokens)", "perplexity", lines, log_y=True, marks=marks)
    draw([chart], path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge demo`."""
    parser.add_argument(
        "-o", "--output", default="yarn-edge-demo", metavar="DIR", help="folder to work in (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=length,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="tokens of text to measure perplexity on (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what an earlier demo left in DIR")
    add_threads_flag(parser)
    add_trust_flag(parser)
    parser.add_argument("--numbers", metavar="FILE.json", help="also write the measured numbers as JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw perplexity by position (needs yarn-edge[plot])")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge demo`."""
    if args.tokens < 16:
        raise YarnEdgeError(f"--tokens {args.tokens}: must be at least 16")
    plot = None if args.plot is None else Path(args.plot)
    outcome = demo(Path(args.output), args.tokens, force=args.force, threads=args.threads, plot=plot)
    if args.numbers:
        write_file(Path(args.numbers), json_text(outcome.as_json(), indent=1) + "\n", force=True)
    return 0
