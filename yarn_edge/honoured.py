"""What the pinned llama.cpp honours of a file's rope keys, one row per architecture.

Read in src/models/*.cpp and src/llama-context.cpp of llama-cpp-python 0.3.36 and held against the running library by
tests/test_honoured.py, so that a version which honours more or less is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass

from yarn_edge.errors import YarnEdgeError
from yarn_edge.rope import Pairing


@dataclass(frozen=True)
class Honoured:
    """What the pinned llama.cpp reads for an architecture beyond type, factor, origin, attn_factor and freq_base."""

    pairing: Pairing
    frequency_factors: bool = False  # it loads rope_freqs.weight
    betas: bool = False
    ext_factor: bool = False
    yarn_attn_factor: bool = False


# One row per GGUF architecture whose positions we can vouch for.
HONOURED: dict[str, Honoured] = {
    "llama": Honoured("interleaved", frequency_factors=True),
    "qwen2": Honoured("half"),
    "qwen3": Honoured("half"),
}


# model_type of a checkpoint -> the GGUF architecture that it becomes.
GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def honoured(architecture: str) -> Honoured:
    """The row of an architecture; an error that names those we know otherwise."""
    if architecture not in HONOURED:
        raise YarnEdgeError(
            f"what the runtime applies for architecture {architecture!r} is not known yet; known: {', '.join(HONOURED)}"
        )
    return HONOURED[architecture]
