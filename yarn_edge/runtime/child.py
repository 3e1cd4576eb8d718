"""Starting one of our modules in a process of its own, for what a stranger's file may do to the process that reads it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from yarn_edge.errors import one_line

# ggml_abort (the path is that of whoever built it), and the C++ library about an exception that nobody caught.
_FATAL = re.compile(r"([^/\\]+\.\w+:\d+: .*)|^what\(\): +(.*)")

# Not PYTHONPATH: its folders come before the standard library, which a types.py beside a user's script would break.
_START = (
    "import sys; sys.path[:] = sys.argv[1].split('\\n'); module = sys.argv[2]; del sys.argv[1:3]; "
    "import runpy; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def start_child(
    module: str, words: Sequence[str] = (), *, stderr: int | IO[bytes] = subprocess.DEVNULL, env: Mapping[str, str] = {}
) -> subprocess.Popen[bytes]:
    """`python -m module words…` with pipes at stdin and stdout. env: variables besides those of this process.

    It starts in the root folder and finds modules where this process does, but for the working folder: a stranger's json.py
    there must not be imported. It is in a session of its own, which Ctrl-C in the terminal does not reach.
    """
    here = os.path.realpath(os.curdir)
    entries = [str(Path(__file__).parents[2]), *(e for e in sys.path if e and os.path.realpath(e) != here)]
    path = "\n".join(dict.fromkeys(os.path.abspath(e) for e in entries))  # noqa: PTH100
    return subprocess.Popen(
        [sys.executable, "-c", _START, path, module, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, **env},
        cwd=os.sep,
        start_new_session=True,
    )


def last_words(errors: bytes) -> str:
    """From what a child wrote to stderr: the assertion or the exception of C++ that ended it, otherwise the last line."""
    lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
    fatal = [found[found.lastindex or 0] for found in map(_FATAL.search, lines) if found]
    return one_line((fatal or lines or [""])[-1], 300)
