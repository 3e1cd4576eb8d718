"""What llama.cpp's log says of loading a model and making a context: buffers, layers on a GPU, flash attention.

Formats: llama-model.cpp, llama-context.cpp, llama-kv-cache.cpp, llama-memory-recurrent.cpp and llama-kv-cache-dsv4.cpp of
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import re

MIB = 2**20
Buffer = tuple[str, str, int]  # where, for what, bytes

_BUFFER = re.compile(r": +(\S+) +(model|KV|RS|DSV4 \S+ state|output|compute) buffer size = +([\d.]+) MiB")
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
_REBUILT = ("compute", "output")  # made again when more is needed, and logged each time


def buffers_in(log: str) -> list[Buffer]:
    """Every buffer that the log names: ("CPU_Mapped", "model", bytes), ("CUDA0", "KV", bytes), …; empty ones are left out.

    Compute and output buffers may be logged more than once, because they are rebuilt: only the last one of each place counts.
    """
    found = [(where, what, bytes_of(mib)) for where, what, mib in _BUFFER.findall(log)]
    lasting = [buffer for buffer in found if buffer[1] not in _REBUILT and buffer[2]]
    return lasting + list({(b[0], b[1]): b for b in found if b[1] in _REBUILT}.values())


def bytes_of(mib: str) -> int:
    """Bytes of a size as the log has it, in MiB with two decimals."""
    return round(float(mib) * MIB)


def offloaded_in(log: str) -> list[int] | None:
    """[layers on the GPU, all layers], counting the output as one; None if llama.cpp was built without a GPU backend."""
    found = _OFFLOADED.findall(log)
    return [int(n) for n in found[-1]] if found else None


def flash_attention_in(log: str) -> bool | None:
    """Whether flash attention runs; None if the log does not say."""
    if re.search(r"flash_attn += +auto", log) is None:
        asked = re.search(r"flash_attn += +(enabled|disabled)", log)
        return None if asked is None else asked[1] == "enabled"
    return re.search(r"Flash Attention (was auto, set to )?enabled", log) is not None
