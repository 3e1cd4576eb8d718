"""Checkpoints whose weights are not plain floats: how their tensors are read.

May import: yarn_edge.errors.
"""
