"""Positions as mathematics: a scaling, its rotations in float64, and the error budget of float32.

May import: NumPy and yarn_edge.errors only: nothing here knows of files or of llama.cpp.
"""
