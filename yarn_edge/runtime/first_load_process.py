"""The process in which a file that is not known here is loaded first: `python -m yarn_edge.runtime.first_load_process REQUEST`.

It does what the commands do: loads header and vocabulary, writes text as tokens and tokens as text, makes a small context, and
evaluates a few tokens at once and one alone, so that every assertion on the way is met. Weights are mapped and not copied.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.effective import FROM_MODEL
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.first_load import REFUSED
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.machine import available_bytes
from yarn_edge.runtime.model import Model

TEXTS = ("", "The first  two\n\n\tlines: 12,345 äöü 漢字 🙂 <s></s>")
CTX, BATCH, MAX_THREADS = 256, 8, 4


def _limit(memory_bytes: int, processor_s: int) -> None:
    """Limits on what is allocated (mapped files do not count) and computed, where the system has them; no core files."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {resource.RLIMIT_DATA: memory_bytes, resource.RLIMIT_CPU: processor_s, resource.RLIMIT_CORE: 0}
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS does not take all of them
            resource.setrlimit(kind, (soft, hard))


def _end_with_parent() -> None:
    """stdin ends when the parent is gone, however it went."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def try_file(path: Path, part: str, overrides: dict[str, Any]) -> None:
    """Everything that may end a process. part: "model", or "vocabulary" without weights. Raises YarnEdgeError."""
    file = read_gguf(path)
    # Weights that do not fit are not read: what they would show is not worth minutes of swapping.
    fits = file.weight_bytes <= available_bytes()
    options: dict[str, Any] = {"vocab_only": True} if part == "vocabulary" else {"no_alloc": not fits}
    with Model(file.path, **options, overrides=overrides, gguf=file, trust=True, repack=False) as model:
        tokens = [token for text in TEXTS for token in model.tokenize(text, add_special=True, parse_special=True)]
        for token in tokens:
            model.token_bytes(token)
        if part == "vocabulary":
            return
        threads = min(MAX_THREADS, physical_threads())
        with Context(
            model, ContextSettings(n_ctx=CTX, n_batch=BATCH, threads=threads, arguments=FROM_MODEL)
        ) as context:
            if fits:
                prompt = [*tokens, 0][:BATCH]
                context.evaluate(prompt, 0)
                context.evaluate([0], len(prompt))
                context.logits()


def main() -> int:
    """Returns 0 if the file can be loaded; 2, with the reason on stdout, if it is refused."""
    request = json.loads(sys.argv[1])
    _end_with_parent()
    _limit(request["memory_bytes"], request["processor_s"])
    try:
        try_file(Path(request["path"]), request["part"], request["overrides"])
    except YarnEdgeError as error:
        sys.stdout.buffer.write(str(error).encode(errors="surrogateescape"))
        return REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
