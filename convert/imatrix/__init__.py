"""Importance matrices: the command, the file format, resuming, and measuring activations.

May import: yarn_edge.runtime and below.
"""
