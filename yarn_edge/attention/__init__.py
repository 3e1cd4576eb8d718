"""Attention on a CPU in kernels of our own, which take the place of ggml's in the live graph.

`vectors` emits the instructions, `cache_rows` reads the types of the KV cache, `blocks` multiplies, `softmax` normalizes; `kernel`
is what ggml's threads call, `node` what it reads of a node. `choose` measures this machine. Needs Numba (`yarn-edge[fast]`).

May import: NumPy, Numba, runtime and below.
"""
