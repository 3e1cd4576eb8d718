"""Importance matrices: the command, the file format, resuming, and the activations that are measured.

May import: yarn_edge.runtime and below.
"""
