"""How different programs run the same GGUF: mean KL divergence of each from the checkpoint in transformers, float32.

`python -m yarn_edge.bench.peers.programs CHECKPOINT FILE.gguf…` prints a table. yarn-edge passes the scaling that the file
describes; "llama.cpp" passes nothing (like llama-cli, ollama, LM Studio); "llama_cpp.Llama" is that class with its own defaults.
Caches are float32; the class is also run with its own default, float16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.graph.opening import open_context
from yarn_edge.llama_rules.effective import FROM_MODEL, RuntimeArguments
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.stdout import write_text
from yarn_edge.verify.transformers_reference import divergence, reference_logits

from ..standalone import run_module

Logits = npt.NDArray[np.float32]
N_TOKENS = 768
F32 = 0  # enum ggml_type


def by_context(path: Path, tokens: list[int], arguments: RuntimeArguments | None) -> Logits:
    """Logits of our low-level loader, (n_tokens, n_vocab). arguments: None for those that it passes for this file."""
    n = len(tokens)
    settings = ContextSettings(n_ctx=n, n_batch=n, kv_type="f32", attention="plain", arguments=arguments)
    with Model(path) as model, open_context(model, settings) as context:
        context.evaluate(tokens, 0, "all")
        return context.logits()


def by_llama_class(path: Path, tokens: list[int], kv_type: int | None) -> Logits:
    """Logits of llama_cpp.Llama with its defaults, (n_tokens, n_vocab). kv_type: None for its own cache type, too."""
    import llama_cpp

    types = {} if kv_type is None else {"type_k": kv_type, "type_v": kv_type}
    llama = llama_cpp.Llama(str(path), n_ctx=len(tokens), n_batch=len(tokens), logits_all=True, verbose=False, **types)
    try:
        llama.eval(tokens)
        return np.array(llama.scores[: len(tokens)], dtype=np.float32)
    finally:
        llama.close()


PROGRAMS: dict[str, Callable[[Path, list[int]], Logits]] = {
    "yarn-edge": lambda path, tokens: by_context(path, tokens, None),
    "llama.cpp": lambda path, tokens: by_context(path, tokens, FROM_MODEL),
    "llama_cpp.Llama": lambda path, tokens: by_llama_class(path, tokens, F32),
    "llama_cpp.Llama, f16 cache": lambda path, tokens: by_llama_class(path, tokens, None),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and its files."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of the checkpoint")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf", help="GGUFs that were made from it")


def run(args: argparse.Namespace) -> int:
    """Print the table as Markdown."""
    with Model(args.files[0], vocab_only=True) as model:
        tokens = model.tokenize(sample_text(), add_special=model.add_bos, parse_special=False)[:N_TOKENS]
    truth = reference_logits(args.checkpoint, tokens)
    out = write_text
    out("| file | run by | mean KL (nats) | top-1 |\n|---|---|---|---|\n")
    for path in args.files:
        for name, logits_by in PROGRAMS.items():
            apart = divergence(truth, logits_by(path, tokens))
            out(f"| {path.name} | {name} | {apart.kl_mean:.2g} | {apart.top1:.1%} |\n")
    return 0


def main() -> int:
    """Returns 2 for bad input."""
    what = "The same file in several programs, against its checkpoint."
    return run_module("peers.programs", what, add_arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
