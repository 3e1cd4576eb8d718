"""llama-server, started with the command line that `yarn-edge export` prints, against our own loader: the same next tokens.

`python -m yarn_edge.bench.peers.exported --server llama-server FILE.gguf…` prints a table. The server gets the exported words and
what makes numbers comparable (a float32 cache, no flash attention, one slot), then prefixes of one text as token ids; it answers
with the log-probability of every token. KL divergence is that of its distributions from ours.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.export.command import export
from yarn_edge.graph.opening import open_context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.stdout import write_text

from ..standalone import run_module
from .server_process import ask, free_port, running_server

N_CTX, PREFIXES = 2048, (16, 64, 256, 512, 1024, 1536, 2000)
COMPARABLE = ("-ctk", "f32", "-ctv", "f32", "-fa", "off", "-np", "1", "--host", "127.0.0.1", "-ngl", "0")
ANSWER_S = 300.0


def server_log_probs(port: int, tokens: list[int], n_vocab: int) -> npt.NDArray[np.float64]:
    """The log-probability of every token after `tokens`, (n_vocab,). The server adds up in float32: its sum is made 1 here."""
    body = {"prompt": tokens, "n_predict": 1, "n_probs": n_vocab, "cache_prompt": True, "temperature": 1.0}
    (first,) = ask(port, "/completion", body, ANSWER_S)["completion_probabilities"]
    values = np.full(n_vocab, -np.inf)
    for token in first["top_logprobs"]:
        values[token["id"]] = token["logprob"]
    return _normalized(values)


def _normalized(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def our_log_probs(path: Path, tokens: list[int]) -> npt.NDArray[np.float64]:
    """The same after each of PREFIXES, (n_prefixes, n_vocab), from our loader with a float32 cache."""
    settings = ContextSettings(n_ctx=N_CTX, n_batch=512, kv_type="f32", attention="plain")
    rows, done = [], 0
    with Model(path) as model, open_context(model, settings) as context:
        for end in PREFIXES:
            context.evaluate(tokens[done:end], done, 1)
            rows.append(_normalized(context.logits()[-1].astype(np.float64)))
            done = end
    return np.array(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program and the files."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument(
        "--server", default="llama-server", metavar="PROGRAM", help="llama-server (default: the one in PATH)"
    )
    parser.add_argument(
        "--plain", action="store_true", help="leave out the exported scaling flags, to see what they are worth"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table as Markdown."""
    write_text("| file | exported flags | mean KL (nats) | largest KL | top-1 |\n|---|---|---|---|---|\n")
    for path in args.files:
        text, _notes = export(path, "llama-server", ctx=N_CTX)
        _program, *words = shlex.split(text)
        scaling = words[4:]  # after -m PATH -c N
        words = words[:4] if args.plain else words
        with Model(path, vocab_only=True) as model:
            tokens = model.tokenize(sample_text(), add_special=model.add_bos, parse_special=False)[: PREFIXES[-1]]
        ours = our_log_probs(path, tokens)
        port = free_port()
        with running_server([args.server, *words, *COMPARABLE, "--port", str(port)], port):
            theirs = np.array([server_log_probs(port, tokens[:end], ours.shape[1]) for end in PREFIXES])
        kl = (np.exp(ours) * (ours - theirs)).sum(axis=1)
        same = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
        flags = f"{len(scaling) // 2} of scaling" if scaling and not args.plain else "none"
        write_text(f"| {path.name} | {flags} | {kl.mean():.2g} | {kl.max():.2g} | {same:.0%} |\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the words of a command line."""
    return run_module(
        "peers.exported", "Compare llama-server, started as exported, with our own loader.", add_arguments, run, argv
    )


if __name__ == "__main__":
    raise SystemExit(main())
