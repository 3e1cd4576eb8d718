"""Adapters: what a LoRA adapter adds to the weights of its base, as tensors whose rows are merged when they are read.

May import: convert's checkpoint and families, yarn_edge.checkpoint, and the ground.
"""
