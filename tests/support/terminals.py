"""`chat` in a process of its own on a pseudo-terminal: send keys, wait for what appears."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest


class ChatProcess:
    """A child whose controlling terminal is a pseudo-terminal of its own, so that Ctrl-C is a signal."""

    def __init__(self, *args: str, env: Mapping[str, str] | None = None, size: tuple[int, int] = (40, 100)) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
        attach = (
            "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); [os.dup2(fd, i) for i in range(3)]; "
            "os.execv(sys.executable, [sys.executable, '-m', 'yarn_edge.chat', *sys.argv[2:]])"
        )
        self.child = subprocess.Popen(
            [sys.executable, "-c", attach, os.ttyname(self.slave), *args],
            start_new_session=True,
            env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", **(env or {})},
        )
        self.seen = ""

    def send(self, text: str | bytes) -> None:
        os.write(self.master, text if isinstance(text, bytes) else text.encode())

    def until(self, pattern: str, timeout_s: float = 60.0) -> str:
        """Read until `pattern` appears. Returns the text up to the end of the match; the next call continues after it."""
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen, re.S)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
            else:
                assert self.child.poll() is None, f"ended before {pattern!r}: {self.seen!r}"
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        assert "a bug in yarn-edge" not in text
        return text


@contextmanager
def in_a_terminal(
    *args: str, env: Mapping[str, str] | None = None, size: tuple[int, int] = (40, 100)
) -> Iterator[ChatProcess]:
    if sys.platform == "win32":
        pytest.skip("no pseudo-terminals")
    made = ChatProcess(*args, env=env, size=size)
    try:
        yield made
    finally:
        made.child.kill()
        made.child.wait()
        os.close(made.master)
        os.close(made.slave)


READY = r".*\x1b\[\?2004h"  # prompt_toolkit asks for bracketed paste when it starts to read
