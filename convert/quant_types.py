"""File types by the names users know (Q4_K_M, IQ2_M, …): those of the pinned llama.cpp, and common aliases."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.runtime.llama_api import llama

_PREFIX = "LLAMA_FTYPE_MOSTLY_"
# Names that people type -> llama.cpp's name.
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP16": "F16", "FP32": "F32", "MXFP4": "MXFP4_MOE"}
# llama.h has a number for them, but llama_ftype_get_default_type (llama-quant.cpp) no tensor type: they cannot be made.
_WITHOUT_RECIPE = frozenset({"NVFP4"})


@dataclass(frozen=True)
class Quant:
    """A file type: its name and its number in llama.cpp (enum llama_ftype, written as general.file_type)."""

    name: str
    ftype: int


@cache
def known_quants() -> dict[str, Quant]:
    """Every file type that the pinned llama.cpp can make, by name."""
    api = llama()
    quants = {"F32": Quant("F32", api.LLAMA_FTYPE_ALL_F32)}
    for name in dir(api):
        short = name.removeprefix(_PREFIX)
        if name.startswith(_PREFIX) and short not in _WITHOUT_RECIPE:
            quants[short] = Quant(short, getattr(api, name))
    return quants


def parse_quants(text: str) -> list[Quant]:
    """The types that "Q4_K_M,Q8_0" names, each once. Raises YarnEdgeError for a name that llama.cpp does not know."""
    chosen: dict[str, Quant] = {}
    for part in text.split(","):
        name = part.strip().upper()
        name = _ALIASES.get(name, name)
        if name not in known_quants():
            known = ", ".join(sorted(known_quants()))
            raise YarnEdgeError(f"--quant {one_line(repr(part), 40)} is unknown; the file types are {known}")
        chosen[name] = known_quants()[name]
    return list(chosen.values())
