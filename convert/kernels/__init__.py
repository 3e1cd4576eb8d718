"""K-quants: which kernel makes which type, and kernels of our own, compiled by Numba.

May import: NumPy, yarn_edge.runtime's ggml; Numba where it is installed.
"""
