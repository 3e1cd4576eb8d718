"""What different programs make of the same GGUF: mean KL divergence of each to the checkpoint in transformers, float32.

`python -m yarn_edge.bench.peers.programs CHECKPOINT FILE.gguf…` prints a table. yarn-edge passes the scaling that the file
describes; "llama.cpp" passes nothing (llama-cli, ollama, LM Studio); "llama_cpp.Llama" is that class with its own defaults.
Caches are float32, and for the class also what it takes by itself, float16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.llama_rules.effective import FROM_MODEL, RuntimeArguments
from yarn_edge.progress import bar
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.verify.transformers_reference import divergence, reference_logits

Logits = npt.NDArray[np.float32]
N_TOKENS = 768
F32 = 0  # enum ggml_type


def by_context(path: Path, tokens: list[int], arguments: RuntimeArguments | None) -> Logits:
    """Our low-level loader; `arguments` None: those it passes for this file."""
    n = len(tokens)
    settings = ContextSettings(n_ctx=n, n_batch=n, kv_type="f32", flash_attention="off", arguments=arguments)
    with Model(path) as model, Context(model, settings) as context:
        context.evaluate(tokens, 0, "all")
        return context.logits()


def by_llama_class(path: Path, tokens: list[int], kv_type: int | None) -> Logits:
    """llama_cpp.Llama with its defaults; kv_type None: its own cache type too."""
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


def main() -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description="The same file in several programs, against its checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    args = parser.parse_args()
    with Model(args.files[0], vocab_only=True) as model:
        tokens = model.tokenize(sample_text(), add_special=model.add_bos, parse_special=False)[:N_TOKENS]
    with bar("Running the checkpoint in transformers", 1):
        truth = reference_logits(args.checkpoint, tokens)
    out = sys.stdout.write
    out("| file | run by | mean KL (nats) | top-1 |\n|---|---|---|---|\n")
    for path in args.files:
        for name, run in PROGRAMS.items():
            found = divergence(truth, run(path, tokens))
            out(f"| {path.name} | {name} | {found.kl_mean:.2g} | {found.top1:.1%} |\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
