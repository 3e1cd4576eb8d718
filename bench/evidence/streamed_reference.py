"""The reference of `verify --against` with all weights in memory and layer by layer: time, peak memory, and the same logits.

`python -m yarn_edge.bench.evidence.streamed_reference CHECKPOINT --tokens 256`. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.runtime.machine import peak_resident_bytes
from yarn_edge.stdout import write_text
from yarn_edge.verify.transformers_reference import reference_logits

from ..standalone import run_module

WAYS = {"all weights": False, "layer by layer": True}


def measure(checkpoint: Path, n_tokens: int, streamed: bool) -> tuple[float, int, int, npt.NDArray[np.float32]]:
    """(seconds, peak memory in bytes, that before the checkpoint, the logits) of random tokens in this process."""
    import torch
    import transformers  # noqa: F401

    n_vocab = read_config(checkpoint).required_integer("vocab_size")
    tokens = torch.randint(n_vocab, (n_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    before, start = peak_resident_bytes(), time.perf_counter()
    logits = reference_logits(checkpoint, tokens, streamed=streamed)
    return time.perf_counter() - start, peak_resident_bytes(), before, logits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and the number of tokens."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of the checkpoint")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="number of tokens (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the table as Markdown. Returns 1 if the logits differ."""
    found: list[Any] = []
    write_text("| way | seconds | peak memory (MB) | before the checkpoint (MB) |\n|---|---|---|---|\n")
    for way, streamed in WAYS.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            seconds, peak, before, logits = process.submit(measure, args.checkpoint, args.tokens, streamed).result()
        write_text(f"| {way} | {seconds:.1f} | {peak / 1e6:.0f} | {before / 1e6:.0f} |\n")
        found.append(logits)
    same = np.array_equal(*found)
    write_text(f"\n{'the same logits, bit for bit' if same else 'the logits differ'}\n")
    return 0 if same else 1


def main() -> int:
    """Returns 1 if the logits differ, 2 for bad input."""
    what = "The reference of verify --against with all weights in memory, and layer by layer."
    return run_module("evidence.streamed_reference", what, add_arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
