"""The mathematics of positions: a scaling, its rotations in float64, and the error budget of float32.

May import: NumPy, yarn_edge.flags and yarn_edge.errors. Nothing here knows about files or llama.cpp.
"""
