"""Quantization types by the names users know, and llama.cpp's own quantizer for all that is not a plain row format.

The quantizer runs in a process of its own: Ctrl-C then really stops it, an abort() inside llama.cpp is an error message
and not the end of convert, and its log becomes a progress bar.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.llama_api import llama, physical_threads
from yarn_edge.progress import bar

_PREFIX = "LLAMA_FTYPE_MOSTLY_"
# Names that people type -> the name llama.cpp gives the type.
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP16": "F16", "FP32": "F32"}
# Written by convert itself, tensor by tensor.
DIRECT = ("F32", "F16", "BF16", "Q8_0")
_STEP = re.compile(rb"\[\s*(\d+)/\s*(\d+)\]")


@dataclass(frozen=True)
class Quant:
    """A file type: its name and llama.cpp's number for it (enum llama_ftype, written as general.file_type)."""

    name: str
    ftype: int

    @property
    def is_direct(self) -> bool:
        """Whether convert writes it itself; all others go through llama_model_quantize."""
        return self.name in DIRECT


@cache
def known_quants() -> dict[str, Quant]:
    """Every file type of the pinned llama.cpp, by name."""
    api = llama()
    found = {"F32": Quant("F32", api.LLAMA_FTYPE_ALL_F32)}
    for name in dir(api):
        if name.startswith(_PREFIX):
            short = name.removeprefix(_PREFIX)
            found[short] = Quant(short, getattr(api, name))
    return found


def parse_quants(text: str) -> list[Quant]:
    """ "Q4_K_M,Q8_0" -> types, without repetition; YarnEdgeError for a name that llama.cpp does not know."""
    chosen: dict[str, Quant] = {}
    for part in text.split(","):
        name = part.strip().upper()
        name = _ALIASES.get(name, name)
        if name not in known_quants():
            known = ", ".join(sorted(known_quants()))
            raise YarnEdgeError(f"--quant {one_line(repr(part), 40)} is unknown; known: {known}")
        chosen[name] = known_quants()[name]
    return list(chosen.values())


def quantize_file(source: Path, target: Path, quant: Quant, threads: int | None = None) -> None:
    """Quantize a 32/16-bit GGUF with llama.cpp. YarnEdgeError with its reason when it refuses (imatrix needed, …)."""
    paths = [os.fspath(p.absolute()) for p in (source, target)]
    command = [sys.executable, "-m", __name__, *paths, str(quant.ftype)]
    command.append(str(threads or physical_threads()))  # cwd is the root: a stranger's llama_cpp.py must not answer
    lines: list[bytes] = []
    with (
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=os.sep) as child,
        bar(f"Quantizing {quant.name}", 1.0, "percent") as advance,
    ):
        assert child.stderr is not None
        shown = 0.0
        try:
            for line in child.stderr:
                lines = [*lines[-20:], line]
                step = _STEP.search(line)
                if step:
                    fraction = int(step[1]) / max(1, int(step[2]))
                    advance(fraction - shown)
                    shown = fraction
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise YarnEdgeError(
            f"llama.cpp cannot quantize to {quant.name}: {_reason(b''.join(lines), target, child.returncode)}"
        )


def _reason(log: bytes, target: Path, code: int) -> str:
    """Why the quantizer failed: its own words, or a full disk, which it calls a failure of its stream."""
    told = re.search(rb"failed to quantize: ([^\n]*)", log)
    if told is None:
        last = log.decode(errors="replace").strip().splitlines()[-1:]
        return one_line(f"it ended with {code} after: {' '.join(last)}", 300)
    reason = one_line(told[1].decode(errors="replace"), 300)
    if b"iostream" in told[1] or b"basic_ios" in told[1]:
        return f"{target.parent}: the file could not be written ({reason}); is the disk full?"
    return reason


def _quantize_here(source: str, target: str, ftype: str, threads: str) -> int:
    """The child: llama_model_quantize with its log on stderr. Returns its exit code."""
    import llama_cpp as api

    @api.llama_log_callback  # type: ignore[untyped-decorator]
    def log(_level: int, text: bytes, _user_data: object) -> None:
        os.write(2, text)

    api.llama_log_set(log, ctypes.c_void_p(0))
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(ftype), int(threads)
    return int(api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0)


if __name__ == "__main__":
    raise SystemExit(_quantize_here(*sys.argv[1:5]))
