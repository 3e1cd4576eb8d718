"""Positions as mathematics: a scaling, its rotations in float64, and the error budget of float32.

May import: NumPy, yarn_edge.flags and yarn_edge.errors: nothing here knows of files or of llama.cpp.
"""
