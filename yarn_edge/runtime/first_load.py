"""The first load of a file that is not known here: in a process of its own, with limits.

llama.cpp asserts many values of a file instead of reporting them, and a failed assertion ends the process. `check_loadable` knows
those that we know; here the others become one line. What is tried is in `yarn_edge.runtime.first_load_process`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from typing import IO

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import TRUST
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.progress import note
from yarn_edge.runtime.child import last_words, start_child
from yarn_edge.runtime.known_files import Part, is_known, remember

SILENT_S = 1.0  # a check that takes longer is announced
MEMORY_BYTES = 2 << 30  # besides the size of the file
PROCESSOR_S, PROCESSOR_S_PER_GB = 30, 20
WALL_TIMES = 20  # reading the file from a slow disk takes no processor time
REFUSED = 2  # its exit code for an error of ours, which is on its stdout
_REMEDY = "--trust skips this check"
# How the process ended -> what that says of the file. {words}: what it last wrote, {name}: the signal.
_ENDS = {
    "SIGABRT": "llama.cpp ends with an assertion when it loads this file: {words}",
    "SIGSEGV": "llama.cpp crashes (SIGSEGV) when it loads this file",
    "SIGBUS": "llama.cpp crashes (SIGBUS) when it loads this file: it may be truncated",
    "SIGFPE": "llama.cpp divides by zero (SIGFPE) when it loads this file",
    "SIGILL": "llama.cpp runs an instruction that this processor does not have (SIGILL): it was built for another one",
    "SIGXCPU": "llama.cpp does not finish loading this file within {seconds} s of processor time",
}
_OTHER_END = (
    "the process that loads this file for the first time was ended by {name}, from outside or because memory ran out"
)
_NO_MEMORY = "llama.cpp needs more memory to load this file than its size and {gib} GiB"


def trusted() -> bool:
    """Whether the variable that --trust sets says that every file may be loaded at once."""
    return os.environ.get(TRUST, "0") not in ("", "0")


def check_first_load(
    file: GGUFFile, version: str, *, vocab_only: bool = False, overrides: Mapping[str, str | bool | int | float] = {}
) -> None:
    """Load a file that is not known here in another process. Raises YarnEdgeError if that process does not get through.

    version: of llama.cpp. vocab_only, overrides: as in `Model`. It takes about as long as the first answer of one token.
    """
    part: Part = "vocabulary" if vocab_only or not file.tensors else "model"
    if is_known(file, part, version):
        return
    seconds = PROCESSOR_S + PROCESSOR_S_PER_GB * file.weight_bytes // 10**9
    request = {
        "path": os.path.realpath(file.path),
        "part": part,
        "overrides": dict(overrides),
        "memory_bytes": sum(path.stat().st_size for path in file.shards or (file.path,)) + MEMORY_BYTES,
        "processor_s": seconds,
    }
    with tempfile.TemporaryFile() as errors:
        code, refusal = _run(file, json.dumps(request), seconds * WALL_TIMES, errors)
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - 65536))
        why = _why(code, last_words(errors.read()), seconds)
    if code == REFUSED and refusal:
        raise YarnEdgeError(refusal)
    if why:
        raise YarnEdgeError(f"{file.path}: {why}; {_REMEDY}")
    remember(file, part, version)


def _run(file: GGUFFile, request: str, timeout_s: float, errors: IO[bytes]) -> tuple[int | None, str]:
    """(exit code, what it said) of the process; None if it was still running after `timeout_s`."""
    try:
        # Only the CPU is tried: a GPU's memory is for the model itself.
        hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1", "OPENBLAS_NUM_THREADS": "1"}
        child = start_child("yarn_edge.runtime.first_load_process", [request], stderr=errors, env=hidden)
    except OSError as error:
        raise YarnEdgeError(
            f"{file.path}: no process can be started to check it: {error.strerror}; {_REMEDY}"
        ) from error
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        try:
            child.wait(SILENT_S)
        except subprocess.TimeoutExpired:
            note(f"loading {file.path.name} for the first time: checked in a process of its own (--trust skips that)")
            child.wait(timeout_s)
        return child.returncode, child.stdout.read().decode(errors="surrogateescape")
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        child.stdin.close()  # open until now: when it ends, this process is gone


def _why(code: int | None, words: str, seconds: int) -> str:
    """What an end says of the file, "" for a good one."""
    if code == 0:
        return ""
    if "bad_alloc" in words or "MemoryError" in words:
        return _NO_MEMORY.format(gib=MEMORY_BYTES >> 30)
    if code is None:
        return f"llama.cpp does not finish loading this file within {seconds * WALL_TIMES} s"
    if code > 0:
        return f"the process that loads this file for the first time ended with {code}: {words or 'it said nothing'}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return _ENDS.get(name, _OTHER_END).format(words=words or "it said nothing", name=name, seconds=seconds)
