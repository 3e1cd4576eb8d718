"""Checkpoint -> GGUF. Installed as `yarn_edge.convert`.

May import: everything in yarn_edge but bench.
"""
