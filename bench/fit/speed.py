"""The memory bandwidth, measured by a separate process while `fit` does everything else.

Measuring takes longer than the simulation, because arrays must be filled, and these arrays would count as memory of the process
that `fit` measures.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import TYPE_CHECKING

from yarn_edge.progress import note

if TYPE_CHECKING:
    from yarn_edge.gguf.file import GGUFFile

TIMES_THE_CACHE = 3.0  # size of the arrays: enough for a quick estimate
SECONDS = 0.05  # of measuring; one pass takes 10 to 30 ms, and the best one counts
LIMIT_S = 10.0
_PROGRAM = """import sys
from yarn_edge.bench.speed.bandwidth import read_bandwidth
print(read_bandwidth(int(sys.argv[1]), *map(float, sys.argv[2:])))"""


class Speed:
    """Tokens per second that the memory bandwidth allows. Use as a context manager."""

    def __init__(self, threads: int) -> None:
        self._bandwidth: float | None = None
        # Not in the working directory: a file there with the name of one of our modules must not run.
        self._process: subprocess.Popen[str] | None = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(threads), str(SECONDS), str(TIMES_THE_CACHE)],
            cwd=tempfile.gettempdir(),
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second that all threads together read; None, with a note, if it cannot be measured."""
        if self._process is not None:
            process, self._process = self._process, None
            try:
                printed, why = process.communicate(timeout=LIMIT_S)
                self._bandwidth = float(printed)
            except (subprocess.TimeoutExpired, ValueError, OSError) as error:
                process.kill()
                process.communicate()  # else its pipes stay open, and it is never waited for
                reason = why.strip().splitlines()[-1] if isinstance(error, ValueError) and why.strip() else str(error)
                note(f"no speed is estimated, because the memory bandwidth cannot be measured: {reason}")
        return self._bandwidth

    def tok_per_s(self, file: GGUFFile, depth: int, kv_type: str) -> float | None:
        """Upper bound of generation with `depth` tokens in the cache: each token reads all weights in use and the whole cache."""
        from ..speed.ceilings import bytes_per_token

        if self.bandwidth is None:
            return None
        n_bytes = bytes_per_token(file, depth, kv_type)
        return self.bandwidth / n_bytes if n_bytes else None

    def __enter__(self) -> Speed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
