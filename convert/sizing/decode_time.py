"""How long a weight of each type takes when a token is generated on an x86 CPU, whatever machine makes the file.

llama.cpp repacks some types for faster kernels (ggml's repack.cpp, ggml_repack_get_optimal_repack_type): on x86 Q4_K and Q4_0 with
AVX2, Q2_K with AVX-512; on ARM Q5_K, Q6_K and Q8_0 too, but not Q2_K. Where memory is what limits, as on a GPU, files of the same
size are equally fast whatever their types.
"""

from __future__ import annotations

from yarn_edge.runtime.ggml_types import GGMLType

# Nanoseconds for each weight: files of one type throughout, one thread, AVX-512, the pinned llama.cpp, 32 tokens (`bench.peers.files`).
NS = {"Q2_K": 0.0306, "Q3_K": 0.0451, "Q4_K": 0.0338, "Q5_K": 0.0471, "Q6_K": 0.0446}
OTHERS_NS = max(NS.values())  # not measured


def decode_ns(n_weights: float, kind: GGMLType) -> float:
    """Of a matrix with which `n_weights` weights are multiplied for each token."""
    return n_weights * NS.get(kind.name, OTHERS_NS)
