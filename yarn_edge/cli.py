"""The entry point, `yarn-edge COMMAND …`: parses, dispatches, and turns every failure into one line and an exit code.

The table names each command's module, so that `yarn-edge --help` loads none of them (nor NumPy or llama_cpp) and nothing in this
package imports `convert` or `bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

from yarn_edge import __version__
from yarn_edge.errors import Terminated, YarnEdgeBug, YarnEdgeError, as_ours, one_line, raise_terminated
from yarn_edge.foreign_text import harmless
from yarn_edge.progress import set_quiet
from yarn_edge.signals import DEFERRED
from yarn_edge.stdout import drop_the_rest

# command -> (module with add_arguments(parser) and run(args) -> exit code, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("yarn_edge.convert.hf_to_gguf", "convert a Hugging Face checkpoint to quantized GGUFs"),
    "quantize": ("yarn_edge.convert.quantize", "quantize a 16-bit GGUF to several types in one pass"),
    "imatrix": ("yarn_edge.convert.imatrix.command", "compute the importance matrix of a model over a text"),
    "inspect": ("yarn_edge.inspect.command", "show what a GGUF or a checkpoint declares, and what the runtime will really apply"),
    "patch": ("yarn_edge.convert.patch", "repair or add scaling in a GGUF without touching its weights"),
    "verify": ("yarn_edge.verify.command", "prove that a GGUF runs the positions that were fine-tuned"),
    "export": ("yarn_edge.export.command", "write what Ollama, LM Studio, llama-server or vLLM needs to run a GGUF at its own positions"),
    "passkey": ("yarn_edge.bench.quality.passkey", "measure passkey and needle retrieval by length and depth"),
    "perplexity": ("yarn_edge.bench.quality.perplexity", "measure how well a model predicts a text, by length and by position"),
    "compare": ("yarn_edge.bench.quality.compare", "measure how far quantizations, caches and scalings diverge from a base model"),
    "sweep": ("yarn_edge.bench.quality.sweep", "measure perplexity or divergence over attention factors, factors or scaling methods"),
    "bench": ("yarn_edge.bench.speed.command", "measure tokens per second by backend, depth and cache, next to the memory's limit"),
    "fit": ("yarn_edge.bench.fit.command", "find the quantization, context and cache type that fit this machine"),
    "chat": ("yarn_edge.chat.command", "talk to a model"),
    "serve": ("yarn_edge.serve.command", "serve one model with an OpenAI-compatible API and a page to chat in the browser"),
    "worker": ("yarn_edge.worker.command", "lend this machine's devices to a model that runs on another one"),
    "get": ("yarn_edge.hub.get", "download a GGUF or a checkpoint from the Hub to the cache that all programs share"),
    "publish": ("yarn_edge.bench.publish.command", "put GGUFs on the Hub, with a model card of what was measured"),
    "demo": ("yarn_edge.bench.demo", "run every step on a real small model"),
}  # fmt: skip
EXIT_BAD_INPUT, EXIT_BUG, EXIT_INTERRUPTED = 2, 70, 130


class _Parser(argparse.ArgumentParser):
    """argparse with its errors in our one-line form."""

    def error(self, message: str) -> NoReturn:
        raise YarnEdgeError(f"{one_line(message)} (see {self.prog} --help)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print no progress and no notes on stderr")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")


def _top_parser() -> argparse.ArgumentParser:
    table = "\n".join(f"  {name:<10} {what}" for name, (_module, what) in COMMANDS.items())
    parser = _Parser(
        prog="yarn-edge",
        description="From a YaRN checkpoint to a quantized GGUF on a laptop, proving that what runs is what was fine-tuned.",
        epilog=f"commands:\n{table}\n\n`yarn-edge COMMAND --help` shows the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="yarn-edge COMMAND …",
    )
    parser.add_argument("--version", action="version", version=f"yarn-edge {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser


def _dispatch(argv: Sequence[str]) -> int:
    top = _top_parser()
    while argv and argv[0] in ("--debug", "--quiet"):  # they may come before the command
        argv = [*argv[1:], argv[0]] if len(argv) > 1 else []
    if not argv or argv[0].startswith("-"):
        top.parse_args(argv)  # --help and --version exit here
        top.print_help(sys.stderr)
        return EXIT_BAD_INPUT
    name = argv[0]
    if name not in COMMANDS:
        raise YarnEdgeError(f"unknown command {one_line(repr(name), 60)}; known: {', '.join(COMMANDS)}")
    module_name, what = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = _Parser(prog=f"yarn-edge {name}", allow_abbrev=False, description=what[0].upper() + what[1:] + ".")
    module.add_arguments(parser)
    _add_common(parser)
    args = parser.parse_args(argv[1:])
    args.command_line = shlex.join(["yarn-edge", *argv])
    set_quiet(args.quiet)
    if any(text.startswith("hf:") for text in argv):
        importlib.import_module("yarn_edge.hub.arguments").bring(name, args)
    return int(module.run(args))


def _utf8_streams() -> None:
    """Answers and paths may hold any character. A terminal that cannot show one gets a replacement, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


def _open_streams() -> None:
    """Closed standard streams become /dev/null. Otherwise the next file opened would take their number, and receive our notes."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.dup(descriptor), mode, encoding="utf-8"))


def _clean_up_on_signals() -> None:
    """SIGTERM and SIGHUP (the terminal closed) end a command as Ctrl-C does, unless somebody else handles them."""
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, raise_terminated)


def run_and_exit(argv: Sequence[str] | None = None) -> NoReturn:
    """The program: `main`, in a process of its own."""
    code = main(argv)
    ignore_signals()
    gc.freeze()  # else the interpreter's end looks for cycles in all that is left: 0.08 s after a conversion
    raise SystemExit(code)


def ignore_signals() -> None:
    """For a process whose work is done: a signal no longer interrupts what the interpreter does at its end."""
    for number in DEFERRED:
        signal.signal(number, signal.SIG_IGN)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 1 if a check failed, 2 for bad input, 130 for Ctrl-C, 70 for a bug in yarn-edge."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    _open_streams()
    _utf8_streams()
    _clean_up_on_signals()
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        drop_the_rest()  # the reader left (`| head`): there is nobody to tell
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED, debug)
    except Terminated as signalled:
        return _fail(f"ended by signal {signalled.number}", 128 + signalled.number, debug)
    except Exception as error:
        ours = as_ours(error)
        return _fail(str(ours), EXIT_BUG if isinstance(ours, YarnEdgeBug) else EXIT_BAD_INPUT, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    trace = harmless(traceback.format_exc()) if debug else ""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{trace}yarn-edge: error: {one_line(message, 2000)}\n")
        sys.stderr.flush()
    return code
