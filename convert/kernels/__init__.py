"""K-quants: which kernel makes which type, and our own kernels, compiled by Numba.

May import: NumPy, yarn_edge.runtime.ggml_types and below, and Numba if it is installed.
"""
