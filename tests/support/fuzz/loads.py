"""Mutated GGUFs loaded into llama.cpp as the commands do it: tried in a process first, then used by `chat`, `verify` and `quantize`.

A file may end the process that tries it. It may not end the one that uses it afterwards.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from yarn_edge.chat.template import RawText
from yarn_edge.convert.quantize import quantize
from yarn_edge.engine.opened import opened
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.memory.placement import Wanted
from yarn_edge.runtime import first_load_process
from yarn_edge.verify.command import verify

from support.fuzz.headers import GGUFs
from support.fuzz.runner import Case

MEMORY = 1 << 30  # besides the size of the file
_REFUSED, _OTHER = 2, 70


class Loads(GGUFs):
    """The files of `headers`, which the runtime runs."""

    name, in_process = "GGUFs in llama.cpp", False

    def case(self, rng: random.Random, scratch: Path) -> Case:
        path = self.write(rng, scratch)
        size = path.stat().st_size
        use = rng.choice((_chat, _verify, _quantize))

        def load() -> str:
            check_loadable(read_gguf(path))  # what is refused here reaches no other process
            code = _forked(lambda: first_load_process.try_file(path, "model", {}), size)
            if code == _REFUSED:
                return "refused"
            if code:
                assert code < 0, f"the first load ended with {code}"
                return f"ended the first load ({signal.Signals(-code).name})"
            code = _forked(lambda: use(path), size)
            assert code in (0, _REFUSED), f"{use.__name__} ended with {code} after the first load"
            return f"used by {use.__name__.strip('_')}"

        return Case(size, load)


def _chat(path: Path) -> None:
    with opened(path, Wanted("cpu", 256, None, None, 1)) as generation:
        tokens = RawText().tokens(generation.context.model, [{"role": "user", "content": "A text."}])
        list(generation.generate(tokens or [0], Sampling(temperature=0), 4))


def _verify(path: Path) -> None:
    verify(path, threads=1)


def _quantize(path: Path) -> None:
    quantize(path, str(path.with_name("quantized.gguf")), "Q8_0", allow_requantize=True, force=True, threads=1)


def _forked(work: Callable[[], object], size: int) -> int:
    """The exit code of a forked process; a negative one is a signal. Killed with this one, and when its time is up."""
    child = os.fork()
    if child == 0:
        code = _OTHER
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for kind, value in ((resource.RLIMIT_DATA, size + MEMORY), (resource.RLIMIT_CORE, 0)):
                resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            code = 0
        except YarnEdgeError as error:
            code = _REFUSED if str(error).isprintable() else _OTHER
        finally:
            os._exit(code)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
